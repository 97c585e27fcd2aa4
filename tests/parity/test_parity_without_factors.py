"""What PEFT's TRAINABLE_TOKENS and LN_TUNING compute, the merged checkpoint computes; norms and a tied head too."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from helpers import assert_close
from safetensors.torch import load_file, save_file
from torch import nn
from torch_side import adapted, run

from lora_jax.io.peft import merge_checkpoint


class Model(nn.Module):
    """A table, two norms of which one has no bias, and a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.last = nn.LayerNorm(6, bias=False)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.up(self.norm(self.embed(x)))))


@pytest.mark.parametrize(
    "options",
    [
        {"config": peft.TrainableTokensConfig, "target_modules": ["embed"], "token_indices": [7, 2]},
        {"config": peft.TrainableTokensConfig, "target_modules": "emb.*", "token_indices": [3]},
        {"config": peft.LNTuningConfig, "target_modules": ["norm", "last"]},
        {"config": peft.LNTuningConfig, "target_modules": ["up"], "modules_to_save": ["norm"]},
    ],
    ids=["tokens", "tokens by a regex", "norms", "a layer and a saved norm"],
)
def test_a_merged_checkpoint_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Model()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    model = adapted(base, **options)
    x = torch.randint(0, 11, (2, 9))
    want = run(model, x)
    model.save_pretrained(str(tmp_path / "given"))
    merge_checkpoint(tmp_path / "base", tmp_path / "given", tmp_path / "out")
    again = Model()
    again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_close(run(again, x), want)
