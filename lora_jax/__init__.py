"""lora_jax: LoRA for any JAX function, as a pure parameter-tree transform.

```python
import lora_jax as lora

sites   = lora.find_sites(model.apply, variables, tokens)    # what the program uses linearly
adapter = lora.init(key, lora.LoraConfig(rank=16), variables, sites)
adapted = lora.adapt(model.apply)                            # adapted(params, adapter, *args, lora_key=None)
merged  = lora.merge(variables, adapter)                     # plain parameters for the plain model
```
"""

# Families of things, under their own names.
from lora_jax import analysis as analysis
from lora_jax import methods as methods
from lora_jax import optim as optim
from lora_jax import routers as routers

# What to adapt, and where a program can be adapted.
# Adapters.
from lora_jax.adapter import Adapter as Adapter
from lora_jax.adapter import scale as scale
from lora_jax.adapter import trainable as trainable

# Running, training and merging.
from lora_jax.apply import adapt as adapt

# Many adapters.
from lora_jax.bank import AdapterBank as AdapterBank
from lora_jax.cache import AdapterCache as AdapterCache
from lora_jax.capture import Captured as Captured
from lora_jax.capture import capture as capture
from lora_jax.capture import redistribute as redistribute

# Several adapters as one.
from lora_jax.compose import canonical as canonical
from lora_jax.compose import compose as compose
from lora_jax.compose import compose_report as compose_report
from lora_jax.config import LoraConfig as LoraConfig

# Errors.
from lora_jax.errors import CheckpointError as CheckpointError
from lora_jax.errors import ConfigError as ConfigError
from lora_jax.errors import LoraError as LoraError
from lora_jax.errors import MatchError as MatchError
from lora_jax.errors import MergeError as MergeError
from lora_jax.errors import ParameterError as ParameterError
from lora_jax.init import init as init
from lora_jax.init import initialisers as initialisers
from lora_jax.init import loftq as loftq

# Disk.
from lora_jax.io import hub as hub
from lora_jax.io import peft as peft
from lora_jax.io.orbax import load as load
from lora_jax.io.orbax import load_config as load_config
from lora_jax.io.orbax import save as save
from lora_jax.merge import absorb as absorb
from lora_jax.merge import merge as merge
from lora_jax.merge_report import merge_report as merge_report
from lora_jax.optim import optimizer as optimizer
from lora_jax.route import route as route
from lora_jax.sharding import adapter_sharding as adapter_sharding
from lora_jax.site import Site as Site
from lora_jax.site import Sites as Sites
from lora_jax.sites import Explanation as Explanation
from lora_jax.sites import explain as explain
from lora_jax.sites import find_sites as find_sites
from lora_jax.summary import summary as summary
from lora_jax.summary import trainable_line as trainable_line
from lora_jax.updates import LowRank as LowRank
from lora_jax.updates import Replace as Replace
from lora_jax.updates import Update as Update
