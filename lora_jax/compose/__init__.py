"""Adapters made of others, and of the difference of two models.

```
compose/compose.py      `compose`: what goes with what, by parameter
compose/fuse.py         the factors of one parameter, as stacks of matrices
compose/terms.py        linear algebra of joined factors
compose/sums.py         weighted sums: cat, svd, slerp, knots
compose/elementwise.py  ties, dare, magnitude_prune, on factors and on updates
compose/selected.py     the strongest terms, or the strongest adapters
compose/whole.py        what has no factors
compose/methods.py      the table of methods
compose/settings.py     what the caller asked for, checked
compose/canonical.py    `canonical`: orthogonal rank-one terms
compose/report.py       `compose_report`: what was lost
compose/resize.py       `resize`: one adapter in another form
compose/extract.py      `extract`: one adapter of the difference of two models
```
"""

from lora_jax.compose.canonical import canonical as canonical
from lora_jax.compose.compose import compose as compose
from lora_jax.compose.extract import extract as extract
from lora_jax.compose.extract import extract_report as extract_report
from lora_jax.compose.report import compose_report as compose_report
from lora_jax.compose.resize import resize as resize
