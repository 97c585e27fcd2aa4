"""Names and layouts of PyTorch modules for the parameters of JAX models, and the way back."""
