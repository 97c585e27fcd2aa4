"""lora_jax's own format of adapters on disk."""
