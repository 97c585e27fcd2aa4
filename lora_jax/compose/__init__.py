"""Adapters made of others, and of the difference of two models.

```
compose/compose.py    `compose` and `compose_report`: one adapter of several, and what was lost
compose/methods.py    the table of methods, their settings; weighted sums: cat, svd, slerp, knots; rank_one, block
compose/ties_dare.py  ties, dare, magnitude_prune, on factors and on updates
compose/full.py       what has no factors: `modules_to_save`, rows, biases
compose/factors.py    low-rank factors as matrices: sums, singular values, norms
compose/resize.py     `resize` and `canonical`: one adapter in another form
compose/extract.py    `extract`: one adapter of the difference of two models
```
"""

from lora_jax.compose.compose import compose as compose
from lora_jax.compose.compose import compose_report as compose_report
from lora_jax.compose.extract import extract as extract
from lora_jax.compose.extract import extract_report as extract_report
from lora_jax.compose.resize import canonical as canonical
from lora_jax.compose.resize import resize as resize
