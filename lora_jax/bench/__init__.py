"""What LoRA costs beside the base: the measurements behind `lora-jax bench`.

```
bench/settings.py   what is varied
bench/cases.py      what is timed: one weight, or a model
bench/programs.py   the modes, compiled, and checked against each other
bench/measuring.py  all of it, in interleaved rounds
bench/rows.py       one line of it, and how its numbers are spelled
bench/result.py     the numbers, as tables, JSON and files
bench/plot.py       the picture
bench/timing.py     rounds in random order, their ratios, and the machine they ran on
```
"""

from lora_jax.bench.cases import Case as Case
from lora_jax.bench.cases import Dense as Dense
from lora_jax.bench.cases import Model as Model
from lora_jax.bench.measuring import RunError as RunError
from lora_jax.bench.measuring import measure as measure
from lora_jax.bench.programs import DisagreementError as DisagreementError
from lora_jax.bench.result import Benchmark as Benchmark
from lora_jax.bench.rows import Row as Row
from lora_jax.bench.settings import Settings as Settings
