"""PEFT adapters into and out of JAX models: `lora_jax.peft.load` and `lora_jax.peft.save`.

`read_peft` and `write_peft` are the same files without a model, as NumPy. `merge_checkpoint` merges them into a Hugging
Face checkpoint on disk.
"""

from lora_jax.io.hf.merge import Merged as Merged
from lora_jax.io.hf.merge import merge_checkpoint as merge_checkpoint
from lora_jax.io.known_names import KNOWN as KNOWN
from lora_jax.io.names import Names as Names
from lora_jax.io.peft_delta import Module as Module
from lora_jax.io.peft_files import PeftFiles as PeftFiles
from lora_jax.io.peft_load import Unmatched as Unmatched
from lora_jax.io.peft_load import load as load
from lora_jax.io.peft_read import read_peft as read_peft
from lora_jax.io.peft_save import save as save
from lora_jax.io.peft_write import write_peft as write_peft
from lora_jax.io.rules import Rule as Rule
