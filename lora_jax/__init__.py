"""lora_jax: LoRA for any JAX function, as a pure parameter-tree transform.

```python
import lora_jax as lora

sites   = lora.find_sites(model.apply, variables, tokens)    # the weights that the program multiplies by
adapter = lora.init(key, lora.LoraConfig(rank=16), variables, sites)
adapted = lora.adapt(model.apply)                            # adapted(params, adapter, *args, lora_key=None)
merged  = lora.merge(variables, adapter)                     # plain parameters for the plain model
```

Config and sites:      `LoraConfig`, `find_sites`, `Sites`, `Site`, `explain`, `Explanation`
Initialisation:        `init`, `initialisers`, `loftq`, `capture`, `Captured`, `redistribute`
Running and training:  `adapt`, `optimizer`, `partition`, `combine`, `trainable`, `optim`, `nnx`,
                       `rules`
Adapters:              `Adapter`, `Update`, `LowRank`, `Replace`, `methods`, `scale`, `summary`, `trainable_line`,
                       `adapter_sharding`
Merging:               `merge`, `absorb`, `merge_report`
Quantised bases:       `quantise`, `dequantise`, `Quantised`
Composing:             `compose`, `compose_report`, `canonical`, `extract`, `extract_report`, `resize`
Many adapters:         `route`, `routers`, `AdapterBank`, `AdapterCache`
Analysis:              `analysis`
Models:                `models`, `generate`
Data and tokenizers:   `data`, `text`
Saving and loading:    `save`, `load`, `load_config`, `peft`, `hub`
Errors:                `LoraError`, `ConfigError`, `MatchError`, `ParameterError`, `MergeError`, `CheckpointError`,
                       `StorageError`

Names are imported when they are first used, so that `import lora_jax` costs nothing beside `import jax`.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from lora_jax import lazy as _lazy

if TYPE_CHECKING:  # What type checkers and editors see; a test holds it equal to the names below.
    from lora_jax import analysis as analysis
    from lora_jax import data as data
    from lora_jax import generate as generate
    from lora_jax import methods as methods
    from lora_jax import models as models
    from lora_jax import nnx as nnx
    from lora_jax import optim as optim
    from lora_jax import rules as rules
    from lora_jax import text as text
    from lora_jax.adapter.adapter import Adapter as Adapter
    from lora_jax.adapter.adapter import scale as scale
    from lora_jax.adapter.adapter import trainable as trainable
    from lora_jax.adapter.sharding import adapter_sharding as adapter_sharding
    from lora_jax.adapter.site import Site as Site
    from lora_jax.adapter.site import Sites as Sites
    from lora_jax.adapter.summary import summary as summary
    from lora_jax.adapter.summary import trainable_line as trainable_line
    from lora_jax.adapter.updates import LowRank as LowRank
    from lora_jax.adapter.updates import Replace as Replace
    from lora_jax.adapter.updates import Update as Update
    from lora_jax.apply import adapt as adapt
    from lora_jax.capture import Captured as Captured
    from lora_jax.capture import capture as capture
    from lora_jax.capture import redistribute as redistribute
    from lora_jax.compose import canonical as canonical
    from lora_jax.compose import compose as compose
    from lora_jax.compose import compose_report as compose_report
    from lora_jax.compose import extract as extract
    from lora_jax.compose import extract_report as extract_report
    from lora_jax.compose import resize as resize
    from lora_jax.config.config import LoraConfig as LoraConfig
    from lora_jax.errors import CheckpointError as CheckpointError
    from lora_jax.errors import ConfigError as ConfigError
    from lora_jax.errors import LoraError as LoraError
    from lora_jax.errors import MatchError as MatchError
    from lora_jax.errors import MergeError as MergeError
    from lora_jax.errors import ParameterError as ParameterError
    from lora_jax.errors import StorageError as StorageError
    from lora_jax.init import init as init
    from lora_jax.init import initialisers as initialisers
    from lora_jax.init import loftq as loftq
    from lora_jax.io import hub as hub
    from lora_jax.io import peft as peft
    from lora_jax.io.own.orbax import load as load
    from lora_jax.io.own.orbax import load_config as load_config
    from lora_jax.io.own.orbax import save as save
    from lora_jax.many import routers as routers
    from lora_jax.many.bank import AdapterBank as AdapterBank
    from lora_jax.many.cache import AdapterCache as AdapterCache
    from lora_jax.many.route import route as route
    from lora_jax.merge import absorb as absorb
    from lora_jax.merge import merge as merge
    from lora_jax.merge import merge_report as merge_report
    from lora_jax.optim.frozen import combine as combine
    from lora_jax.optim.frozen import optimizer as optimizer
    from lora_jax.optim.frozen import partition as partition
    from lora_jax.quantise import dequantise as dequantise
    from lora_jax.quantise import quantise as quantise
    from lora_jax.quantised.leaf import Quantised as Quantised
    from lora_jax.sites import Explanation as Explanation
    from lora_jax.sites import explain as explain
    from lora_jax.sites import find_sites as find_sites

__version__ = _version("lora_jax")

_lazy.face(
    __name__,
    {
        "lora_jax.adapter.adapter": "Adapter scale trainable",
        "lora_jax.adapter.sharding": "adapter_sharding",
        "lora_jax.adapter.site": "Site Sites",
        "lora_jax.adapter.summary": "summary trainable_line",
        "lora_jax.adapter.updates": "LowRank Replace Update",
        "lora_jax.analysis": "",
        "lora_jax.apply": "adapt",
        "lora_jax.capture": "Captured capture redistribute",
        "lora_jax.compose": "canonical compose compose_report extract extract_report resize",
        "lora_jax.config.config": "LoraConfig",
        "lora_jax.data": "",
        "lora_jax.generate": "",
        "lora_jax.errors": "CheckpointError ConfigError LoraError MatchError MergeError ParameterError StorageError",
        "lora_jax.init": "init initialisers loftq",
        "lora_jax.io.hub": "",
        "lora_jax.io.own.orbax": "load load_config save",
        "lora_jax.io.peft": "",
        "lora_jax.many.bank": "AdapterBank",
        "lora_jax.many.cache": "AdapterCache",
        "lora_jax.many.route": "route",
        "lora_jax.many.routers": "",
        "lora_jax.merge": "absorb merge merge_report",
        "lora_jax.methods": "",
        "lora_jax.models": "",
        "lora_jax.nnx": "",
        "lora_jax.optim": "",
        "lora_jax.optim.frozen": "combine optimizer partition",
        "lora_jax.quantise": "dequantise quantise",
        "lora_jax.quantised.leaf": "Quantised",
        "lora_jax.rules": "",
        "lora_jax.sites": "Explanation explain find_sites",
        "lora_jax.text": "",
    },
)
