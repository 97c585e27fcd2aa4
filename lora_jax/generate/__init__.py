"""Continuing texts with a model of `lora_jax.models`, alone or with adapters.

```
generate/sampling.py    how a token is chosen
generate/decoding.py    compiled programs: read prompts into a cache, write tokens
generate/forward.py     the model in those programs: by itself, adapted, or with an adapter for every row
generate/kept.py        the cache of a text that goes on
generate/text.py        from tokens to text as they come, up to a stop string
generate/generator.py   Generator: prompts in, texts out
generate/adapters.py    adapters from disk by name
```
"""

from typing import TYPE_CHECKING

from lora_jax import lazy as _lazy

if TYPE_CHECKING:
    from lora_jax.generate.adapters import load_adapter as load_adapter
    from lora_jax.generate.adapters import load_adapters as load_adapters
    from lora_jax.generate.generator import Continuation as Continuation
    from lora_jax.generate.generator import Generator as Generator
    from lora_jax.generate.sampling import Sampling as Sampling
    from lora_jax.generate.text import Answer as Answer

_lazy.face(
    __name__,
    {
        "lora_jax.generate.adapters": "load_adapter load_adapters",
        "lora_jax.generate.generator": "Continuation Generator",
        "lora_jax.generate.sampling": "Sampling",
        "lora_jax.generate.text": "Answer",
    },
)
