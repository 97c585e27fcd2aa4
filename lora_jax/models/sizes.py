"""The transformers that the command line knows by name."""

from typing import Literal

from lora_jax.models.transformer import TransformerConfig

Size = Literal["tiny", "small", "medium"]

SIZES: dict[Size, TransformerConfig] = {
    "tiny": TransformerConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=64),
    "small": TransformerConfig(),
    "medium": TransformerConfig(layers=6, width=256, heads=8, kv_heads=2, hidden=704),
}
"""Shapes by name."""
