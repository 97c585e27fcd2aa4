"""Regular expressions that cannot hang, for patterns that come from files."""

from lora_jax.regex.match import check, fullmatch

__all__ = ["check", "fullmatch"]
