"""What adapters did to weights, and what rounding would do: numbers, tables and pictures.

```
analysis/spectra.py     `spectra`: singular values of every update, its ranks, its size beside the weight
analysis/overlap.py     `overlap`: whether two adapters use the same directions, and whether they agree on signs
analysis/intruders.py   `intruders`: singular vectors of adapted weights that the weights did not have
analysis/rounding.py    `rounding`: truncating singular values against rounding to INT8, INT4 and NF4, at equal bytes
analysis/codes.py       those formats
analysis/terms.py       updates as singular triplets
analysis/rows.py        rows of reports, their names and tables
analysis/pictures.py    their pictures
analysis/plots.py       what those have in common: heat maps by parameter and layer, panels, files
```

Everything runs outside of `jax.jit`, as its results are numbers. Layers and experts of a stack have a row each.
"""

from lora_jax.analysis.intruders import intruders
from lora_jax.analysis.overlap import overlap
from lora_jax.analysis.rounding import rounding
from lora_jax.analysis.spectra import spectra

__all__ = ["intruders", "overlap", "rounding", "spectra"]
