"""`lora-jax export`: from either format, for every server, or one line on why not."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, random_adapter
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.io.peft import read_peft
from lora_jax.io.peft.servers import SERVERS

PARAMS = {"layers_0": {"up": {"kernel": jnp.ones((5, 6))}, "down": {"kernel": jnp.ones((6, 4))}}}


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["layers_0"]["up"]["kernel"]) @ params["layers_0"]["down"]["kernel"]


SITES = lora.find_sites(mlp, PARAMS, jnp.ones((2, 5)))


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lora.Adapter:
    monkeypatch.chdir(tmp_path)
    made = random_adapter(SITES, rank=3)
    lora.save("own", made)
    lora.peft.save("peft", made)
    return made


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("source", ["own", "peft"])
def test_every_server_from_both_formats(source: str, server: str, adapter: lora.Adapter, capsys: Any) -> None:
    assert main(["export", source, "out", "--for", server, "--base-model", "some/model"]) == 0
    assert "reads" in capsys.readouterr().out
    if server == "mlx":
        arrays = load_file("out/adapters.safetensors")
        scale = json.loads(Path("out/adapter_config.json").read_text(encoding="utf-8"))["lora_parameters"]["scale"]
        for path in adapter:
            name = path.removesuffix("/kernel").replace("layers_0/", "layers.0.")
            found = np.float32(scale) * (arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"])
            update = adapter[path]
            assert isinstance(update, lora.LowRank)
            assert_close(found, np.asarray(update.delta()))
        return
    config = read_peft("out").config
    assert not any(config.get(field) for field in ("rank_pattern", "alpha_pattern", "use_rslora"))
    assert config["base_model_name_or_path"] == "some/model"
    assert_close(lora.merge(PARAMS, lora.peft.load("out", PARAMS, SITES)), lora.merge(PARAMS, adapter))


def test_json_has_the_verdicts(adapter: lora.Adapter, capsys: Any) -> None:
    assert main(["export", "peft", "out", "--for", "vllm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["server"], each["verdict"]) for each in found["rows"]][:3] == [
        ("vllm", "reads"), ("sglang", "reads"), ("llama.cpp", "reads"),
    ]  # fmt: skip
    assert main(["inspect", "peft", "--json"]) == 0
    assert {each["server"] for each in json.loads(capsys.readouterr().out)["portability"]} == {*SERVERS}


@pytest.mark.parametrize(("name", "peft_type"), [("vera", "VERA"), ("adalora_conv2", "ADALORA"), ("rslora", "LORA")])
def test_peft_takes_its_other_types_as_they_are(name: str, peft_type: str, tmp_path: Path) -> None:
    assert main(["export", str(GOLDEN / name), str(tmp_path / "out"), "--for", "peft"]) == 0
    assert read_peft(tmp_path / "out").config["peft_type"] == peft_type


def test_files_of_other_tools_are_exported_and_said_to_be_read_by_none(adapter: lora.Adapter, capsys: Any) -> None:
    assert main(["export", "peft", "mlx", "--for", "mlx"]) == 0
    capsys.readouterr()
    assert {each.verdict for each in lora.peft.portability("mlx").rows if each.server != "mlx"} == {"refuses"}
    assert main(["export", "mlx", "out", "--for", "vllm"]) == 0
    assert_close(lora.merge(PARAMS, lora.peft.load("out", PARAMS, SITES)), lora.merge(PARAMS, adapter))
    Path("alone").mkdir()
    Path("alone/adapter_model.safetensors").write_bytes(Path("peft/adapter_model.safetensors").read_bytes())
    assert main(["inspect", "alone"]) == 0
    assert main(["export", "alone", "no", "--for", "peft"]) == 2
    assert main(["export", "alone", "told", "--for", "peft", "--alpha", "6"]) == 0
    assert read_peft("told").scale("layers.0.up") == 2.0


REFUSED = {
    "export own out --for vllm --alpha 2": "leave --alpha out",
    "export peft out": "--for",
    "export peft out --for gguf": "--for",
    "export nowhere out --for vllm": "nowhere",
    "export peft peft --for vllm": "peft exists already",
    "export peft out --for vllm --names tunix": "leave --names out",
    "export GOLDEN/dora out --for vllm": "it has no DoRA: merge it into the base",
    "export GOLDEN/saved out --for vllm": "of modules_to_save it takes classifier and score only",
    "export GOLDEN/lora_bias out --for sglang": "sglang misreads",
    "export GOLDEN/tokens out --for llama.cpp": "embed: it takes factors only",
    "export GOLDEN/conv2 out --for mlx": "it adapts no convolutions",
    "export GOLDEN/ln_tuning out --for vllm": "it is no LoRA, as it has no factors",
    "export GOLDEN/vera out --for vllm": "lora_jax.peft.save(..., uniform=True)",
}


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_line_and_write_nothing(args: str, adapter: lora.Adapter, tmp_path: Path, capsys: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(args.replace("GOLDEN", str(GOLDEN)).split()) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("lora-jax: ") and complaint.count("\n") == 1
    assert REFUSED[args] in complaint
    assert sorted(tmp_path.rglob("*")) == before
