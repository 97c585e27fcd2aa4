"""Training: texts, the loop, evaluation, logs and plots behind `lora-jax`."""
