"""What LoRA costs beside the base: the measurements behind `lora-jax bench`.

```
bench/cases.py      what is timed: one weight, or a model; and what is varied
bench/programs.py   the modes, compiled, and checked against each other
bench/timing.py     `measure`: all of it, in interleaved rounds, their ratios, and the machine they ran on
bench/result.py     the numbers, as tables, JSON, picture and files
```
"""

from lora_jax.bench.cases import Case as Case
from lora_jax.bench.cases import Dense as Dense
from lora_jax.bench.cases import Model as Model
from lora_jax.bench.cases import Settings as Settings
from lora_jax.bench.programs import DisagreementError as DisagreementError
from lora_jax.bench.result import Benchmark as Benchmark
from lora_jax.bench.result import Row as Row
from lora_jax.bench.timing import RunError as RunError
from lora_jax.bench.timing import measure as measure
