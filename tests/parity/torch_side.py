"""PyTorch's half of the comparisons: adapted models with numbers in them, and their weights as NumPy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file
from torch import nn


def adapted(base: nn.Module, name: str = "default", config: Any = LoraConfig, **options: Any) -> PeftModel:
    """The model with random numbers wherever PEFT trains, so that B is not zero."""
    model = get_peft_model(base, config(**options), adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    return model.eval()


def opened(base: nn.Module, path: Path) -> PeftModel:
    """The model with the adapter at `path`, which has exactly the tensors that PEFT would write for it."""
    model = PeftModel.from_pretrained(base, path)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    # With bias="all" PEFT also writes the biases of modules that it replaced, and those in their place twice.
    used = {key for key in saved if ".original_module." not in key and ".modules_to_save." not in key}
    assert used == load_file(path / "adapter_model.safetensors").keys()
    return model.eval()


def numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state as NumPy, copied, so that what happens to the model later does not change it."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def run(model: nn.Module, x: Any) -> np.ndarray:
    """The output without gradients; logits of a model of transformers."""
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out).numpy()
