"""The engine: runs an unchanged JAX program with some parameters symbolic, as base plus low-rank terms."""

from lora_jax.engine.context import Context as Context
from lora_jax.engine.context import Log as Log
from lora_jax.engine.context import Strategy as Strategy
from lora_jax.engine.context import Use as Use
from lora_jax.engine.lift import dense as dense
from lora_jax.engine.lift import interpret as interpret
from lora_jax.engine.rules import control as control
from lora_jax.engine.rules import convolution as convolution
from lora_jax.engine.rules import gather as gather
from lora_jax.engine.rules import linear as linear
from lora_jax.engine.rules import pallas as pallas
from lora_jax.engine.rules import structural as structural
