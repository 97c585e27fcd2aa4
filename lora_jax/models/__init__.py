"""Models of Hugging Face directories as plain functions of their parameters.

`load` reads a directory, `Model` is what it returns, `save` writes one, `with_classes` gives one a head for classes,
`initial` makes one that nobody has trained, and `empty_cache` the cache with which texts are continued.
"""

from typing import TYPE_CHECKING

from lora_jax import lazy as _lazy

if TYPE_CHECKING:
    from lora_jax.models.cache import empty_cache as empty_cache
    from lora_jax.models.classes import with_classes as with_classes
    from lora_jax.models.config import DecoderConfig as DecoderConfig
    from lora_jax.models.initial import initial as initial
    from lora_jax.models.load import Model as Model
    from lora_jax.models.load import load as load
    from lora_jax.models.save import save as save

_lazy.face(
    __name__,
    {
        "lora_jax.models.cache": "empty_cache",
        "lora_jax.models.classes": "with_classes",
        "lora_jax.models.config": "DecoderConfig",
        "lora_jax.models.initial": "initial",
        "lora_jax.models.load": "Model load",
        "lora_jax.models.save": "save",
    },
)
