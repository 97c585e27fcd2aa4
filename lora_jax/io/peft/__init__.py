"""PEFT adapters into and out of JAX models: `lora_jax.peft.load` and `lora_jax.peft.save`.

`read_peft` and `write_peft` are the same files without a model, as NumPy. `merge_checkpoint` merges them into a Hugging
Face checkpoint on disk.
"""

from typing import TYPE_CHECKING

from lora_jax import lazy as _lazy

if TYPE_CHECKING:
    from lora_jax.io.hf.merge import Merged as Merged
    from lora_jax.io.hf.merge import merge_checkpoint as merge_checkpoint
    from lora_jax.io.names.known import KNOWN as KNOWN
    from lora_jax.io.names.maxtext import maxtext_names as maxtext_names
    from lora_jax.io.names.names import Names as Names
    from lora_jax.io.names.rules import Rule as Rule
    from lora_jax.io.peft.files import PeftFiles as PeftFiles
    from lora_jax.io.peft.load import Unmatched as Unmatched
    from lora_jax.io.peft.load import load as load
    from lora_jax.io.peft.mlx import write_mlx as write_mlx
    from lora_jax.io.peft.module import Module as Module
    from lora_jax.io.peft.portability import Portability as Portability
    from lora_jax.io.peft.portability import portability as portability
    from lora_jax.io.peft.read import read_peft as read_peft
    from lora_jax.io.peft.save import save as save
    from lora_jax.io.peft.write import write_peft as write_peft

_lazy.face(
    __name__,
    {
        "lora_jax.io.hf.merge": "Merged merge_checkpoint",
        "lora_jax.io.names.known": "KNOWN",
        "lora_jax.io.names.maxtext": "maxtext_names",
        "lora_jax.io.names.names": "Names",
        "lora_jax.io.names.rules": "Rule",
        "lora_jax.io.peft.module": "Module",
        "lora_jax.io.peft.files": "PeftFiles",
        "lora_jax.io.peft.load": "Unmatched load",
        "lora_jax.io.peft.mlx": "write_mlx",
        "lora_jax.io.peft.portability": "Portability portability",
        "lora_jax.io.peft.read": "read_peft",
        "lora_jax.io.peft.save": "save",
        "lora_jax.io.peft.write": "write_peft",
    },
)
