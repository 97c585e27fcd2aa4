"""PEFT computes the same with an adapter of one rank and one scale as with the one that it was made of."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from helpers import assert_close
from torch import nn
from torch_side import adapted, opened, run

from lora_jax.io.peft import read_peft, write_peft
from lora_jax.io.peft.uniform import uniform

PATTERNS: dict[str, Any] = {
    "r": 3, "lora_alpha": 5, "rank_pattern": {"up": 5, "conv": 6}, "alpha_pattern": {"up": 1, "embed": 7},
}  # fmt: skip


class Model(nn.Module):
    """A table, a convolution in groups, linear layers, and a head below a name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 9, 3, groups=3)
        self.up, self.top = nn.Linear(9, 6), nn.ModuleDict({"score": nn.Linear(6, 2)})

    def forward(self, x: Any) -> Any:
        return self.top["score"](torch.tanh(self.up(self.conv(self.embed(x).swapaxes(1, 2)).swapaxes(1, 2))))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_rslora": True}, {"modules_to_save": ["top.score"]}, {"lora_bias": True, "bias": "lora_only", "target_modules": ["up", "score"]},
        {"use_dora": True, "target_modules": ["embed", "up"]}, {"target_modules": ".*(up|score)"},
        {"trainable_token_indices": {"embed": [1, 4]}, "target_modules": ["up", "conv"]},
    ],
    ids=lambda options: ",".join(options) or "patterns",
)  # fmt: skip
def test_peft_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Model()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    settings = {"target_modules": ["embed", "up", "conv"], **PATTERNS, **options}
    model = adapted(base, **settings)
    x = torch.randint(0, 11, (2, 7))
    want = run(model, x)
    model.save_pretrained(str(tmp_path / "given"), save_embedding_layers=False)
    write_peft(tmp_path / "made", uniform(read_peft(tmp_path / "given")))
    config = read_peft(tmp_path / "made").config
    assert not any(config.get(field) for field in ("rank_pattern", "alpha_pattern", "use_rslora"))
    again = Model()
    again.load_state_dict(state)
    assert_close(run(opened(again, tmp_path / "made"), x), want)
