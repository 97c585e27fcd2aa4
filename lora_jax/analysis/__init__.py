"""What adapters did to weights, and what rounding would do: numbers, tables and pictures.

```
analysis/spectra.py     `spectra`: singular values of every update, its ranks, its size beside the weight
analysis/overlap.py     `overlap`: whether two adapters use the same directions, and whether they agree on signs
analysis/intruders.py   `intruders`: singular vectors of adapted weights that the weights did not have
analysis/rounding.py    `rounding`: truncating singular values against rounding to INT8, INT4 and NF4, at equal bytes
analysis/rows.py        what the reports share: rows by layer, and the singular value decomposition of an update
analysis/pictures.py    their pictures: heat maps by parameter and layer, panels, files
```

Everything runs outside of `jax.jit`, as its results are numbers. Layers and experts of a stack have a row each.
"""

from lora_jax.analysis.intruders import intruders
from lora_jax.analysis.overlap import overlap
from lora_jax.analysis.rounding import rounding
from lora_jax.analysis.spectra import spectra

__all__ = ["intruders", "overlap", "rounding", "spectra"]
