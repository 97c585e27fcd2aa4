"""Make the golden files: small adapters written by real PEFT, and what PEFT makes of the base with them.

Run with torch, peft and transformers installed: `python tests/golden/make.py [CASE ...]`. Every case is a directory
with PEFT's own two files, and `expected.safetensors` with the base's state, an input, the adapted output, and every
merged weight.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LNTuningConfig, LoraConfig, TrainableTokensConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent


class Experts(nn.Module):
    """A mixture in which every expert sees every token; both layouts of stacked weights."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 6, 10), (3, 5, 6)) if is_transposed else ((3, 10, 6), (3, 6, 5))
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.mT, down.mT
        gate, value = torch.einsum("bi,eio->ebo", x, up).chunk(2, -1)
        return torch.einsum("ebo,eoi->bi", torch.tanh(gate) * value, down)


class Block(nn.Module):
    """Linear layers under names as deep as a real model's."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(5, 7), "v": nn.Linear(5, 7, bias=False)})
        self.up = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(torch.tanh(self.attn["q"](x)) * self.attn["v"](x))


class Net(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Wrapped(nn.Module):
    """One layer under a name, so that PEFT can replace it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


STEPS = 5
ADALORA = {"config": AdaLoraConfig, "total_step": STEPS}
TOKENS = torch.tensor([[1, 7, 3, 10], [0, 2, 2, 9]])
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], dict[str, Any]]] = {
    "linear": (Net, lambda: TOKENS, {"r": 3, "lora_alpha": 5, "target_modules": ["q", "v", "up"]}),
    "embedding": (Net, lambda: TOKENS, {"r": 2, "lora_alpha": 3, "target_modules": ["embed", "q"]}),
    "patterns": (
        Net,
        lambda: TOKENS,
        {
            "r": 2, "lora_alpha": 3, "target_modules": ["q", "v", "up"],
            "rank_pattern": {"layers.1.attn.q": 4, "q": 1, "up": 5}, "alpha_pattern": {"attn.q": 7.5},
        },
    ),
    "rslora": (Net, lambda: TOKENS, {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["up"]}),
    "saved": (Net, lambda: TOKENS, {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"]}),
    "bias_lora_only": (Net, lambda: TOKENS, {"r": 2, "target_modules": ["q", "v"], "bias": "lora_only"}),
    "bias_all": (Net, lambda: TOKENS, {"r": 2, "target_modules": ["q", "v"], "bias": "all"}),
    "conv1d_hf": (
        lambda: Wrapped(Conv1D(9, 5)), lambda: torch.randn(2, 5),
        {"r": 2, "target_modules": ["layer"], "fan_in_fan_out": True},
    ),
    "conv1": (lambda: Wrapped(nn.Conv1d(4, 6, 3, stride=2, padding=1)), lambda: torch.randn(2, 4, 9), {"r": 3, "target_modules": ["layer"]}),  # noqa: E501
    "conv2": (lambda: Wrapped(nn.Conv2d(4, 6, (3, 2))), lambda: torch.randn(2, 4, 8, 7), {"r": 3, "target_modules": ["layer"]}),  # noqa: E501
    "conv3": (lambda: Wrapped(nn.Conv3d(2, 5, (3, 2, 1))), lambda: torch.randn(2, 2, 5, 4, 3), {"r": 2, "target_modules": ["layer"]}),  # noqa: E501
    "experts": (
        lambda: Wrapped(Experts(False)), lambda: torch.randn(4, 6),
        {"r": 2, "target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"],
         "rank_pattern": {"layer.down_proj": 3}, "alpha_pattern": {"down_proj": 2}},
    ),
    "experts_transposed": (
        lambda: Wrapped(Experts(True)), lambda: torch.randn(4, 6),
        {"r": 2, "target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]},
    ),
    "dora": (Net, lambda: TOKENS, {"r": 2, "use_dora": True, "target_modules": ["embed", "q", "v", "up"]}),
    "dora_conv1d_hf": (
        lambda: Wrapped(Conv1D(9, 5)), lambda: torch.randn(2, 5),
        {"r": 2, "use_dora": True, "target_modules": ["layer"], "fan_in_fan_out": True},
    ),
    "dora_conv2": (lambda: Wrapped(nn.Conv2d(4, 6, (3, 2))), lambda: torch.randn(2, 4, 8, 7), {"r": 3, "use_dora": True, "target_modules": ["layer"]}),  # noqa: E501
    "lora_bias": (Net, lambda: TOKENS, {"r": 2, "lora_alpha": 6, "lora_bias": True, "target_modules": ["q", "up"]}),
    "adalora": (Net, lambda: TOKENS, {**ADALORA, "init_r": 4, "lora_alpha": 6, "target_modules": ["q", "v", "up"]}),
    "adalora_pruned": (
        Net, lambda: TOKENS,
        {**ADALORA, "init_r": 3, "target_r": 1, "lora_alpha": 9,
         "target_modules": ["q", "v", "up"], "modules_to_save": ["head"]},
    ),
    "adalora_conv1d_hf": (
        lambda: Wrapped(Conv1D(9, 5)), lambda: torch.randn(2, 5),
        {**ADALORA, "init_r": 3, "target_r": 2, "target_modules": ["layer"], "fan_in_fan_out": True},
    ),
    "adalora_conv2": (lambda: Wrapped(nn.Conv2d(4, 6, (3, 2))), lambda: torch.randn(2, 4, 8, 7), {**ADALORA, "init_r": 3, "target_modules": ["layer"]}),  # noqa: E501
    "vera": (
        Net, lambda: TOKENS,
        {"config": VeraConfig, "r": 4, "target_modules": ["q", "v", "up"], "projection_prng_key": 3},
    ),
    "vera_bias": (
        Net, lambda: TOKENS,
        {"config": VeraConfig, "r": 3, "target_modules": ["q", "up"], "vera_dropout": 0.25,
         "bias": "vera_only", "modules_to_save": ["head"]},
    ),
    "vera_conv1d_hf": (
        lambda: Wrapped(Conv1D(9, 5)), lambda: torch.randn(2, 5),
        {"config": VeraConfig, "r": 3, "target_modules": ["layer"], "fan_in_fan_out": True},
    ),
    "tokens": (Net, lambda: TOKENS, {"r": 2, "target_modules": ["q"], "trainable_token_indices": {"embed": [1, 9]}}),
    "trainable_tokens": (
        Net, lambda: TOKENS, {"config": TrainableTokensConfig, "target_modules": ["embed"], "token_indices": [1, 9]},
    ),
    "ln_tuning": (Net, lambda: TOKENS, {"config": LNTuningConfig, "target_modules": ["up"]}),
}  # fmt: skip


def make(name: str) -> None:
    """Write one case."""
    build, example, options = CASES[name]
    torch.manual_seed(len(name))
    base, x = build(), example()
    state = {f"base.{key}": value.clone() for key, value in base.state_dict().items()}
    kind = options.get("config", LoraConfig)
    model = get_peft_model(base, kind(**{field: value for field, value in options.items() if field != "config"}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    if "target_r" in options:
        model(x).square().sum().backward()
        for step in range(1, STEPS + 1):
            model.base_model.update_and_allocate(step)
        model.zero_grad()
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    expected = {"x": x, "y": model(x)} | state
    merged = model.merge_and_unload().state_dict()
    expected |= {f"merged.{key}": value for key, value in merged.items()}
    save_file(
        {key: value.detach().clone().contiguous() for key, value in expected.items()}, folder / "expected.safetensors"
    )


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
