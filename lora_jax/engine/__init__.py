"""The engine: runs an unchanged JAX program with some parameters symbolic, as base plus low-rank terms."""

from lora_jax.engine import rules as rules
from lora_jax.engine.context import Context as Context
from lora_jax.engine.context import Log as Log
from lora_jax.engine.context import Strategy as Strategy
from lora_jax.engine.context import Use as Use
from lora_jax.engine.lift import Call as Call
from lora_jax.engine.lift import dense as dense
from lora_jax.engine.lift import evaluate_call as evaluate_call
from lora_jax.engine.lift import interpret as interpret
from lora_jax.engine.lift import trace_call as trace_call
