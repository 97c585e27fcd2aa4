"""Rules: what each JAX primitive does to a weight with low-rank terms; one module for each kind of primitive."""

from lora_jax.engine.rules import assembled as assembled
from lora_jax.engine.rules import control_flow as control_flow
from lora_jax.engine.rules import convolution as convolution
from lora_jax.engine.rules import elementwise as elementwise
from lora_jax.engine.rules import gather as gather
from lora_jax.engine.rules import linear as linear
from lora_jax.engine.rules import pallas as pallas
from lora_jax.engine.rules import structural as structural
