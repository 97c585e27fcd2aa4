"""Models by the name they have on the Hugging Face Hub: out of the cache, without a network; and what is said without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_runs import bytes_model, sums

from lora_jax import CheckpointError, models
from lora_jax.cli import main
from lora_jax.models.gguf import _converted_from
from lora_jax.models.locate import Located, locate

COMMIT = "b" * 40
NAME = "someone/tiny-model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home" / "hub"


def cached(cache: Path, made: Path) -> Path:
    """A model as a download of its main branch leaves it: files are links to blobs."""
    folder = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for each in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / each).mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(folder / "blobs" / f"{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    return snapshot


def test_a_model_in_the_cache_is_found_without_a_network(cache: Path, tmp_path: Path):
    snapshot = cached(cache, bytes_model(tmp_path / "made"))
    assert locate(NAME) == (snapshot, NAME)
    assert locate(f"{NAME}@{COMMIT}") == locate(snapshot) == (snapshot, NAME)
    model = models.load(NAME)
    assert (model.name, model.directory, model.tokenizer is None) == (NAME, snapshot, False)
    models.save(tmp_path / "copy", model)
    assert not (tmp_path / "copy" / "tokenizer.json").is_symlink()
    assert models.load(tmp_path / "copy").name == str(tmp_path / "copy")


def test_the_environment_says_where_the_cache_is(tmp_path: Path):
    snapshot = cached(tmp_path / "home" / "hub", bytes_model(tmp_path / "made"))
    code = f"from lora_jax.models.locate import locate; print(locate({NAME!r}).path)"
    given = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(snapshot)


def test_commands_take_the_name(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cached(cache, bytes_model(tmp_path / "made"))
    how = f"--data {sums(tmp_path / 'data.jsonl')} --length 32 --batch 2 --steps 1 --held-out 0 --targets q_proj"
    assert main(f"finetune --model {NAME} --out {tmp_path}/out {how}".split()) == 0
    adapter = tmp_path / "out" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == NAME
    assert main(f"generate --model {NAME} --adapter {adapter} --prompt a --max-tokens 2".split()) == 0
    assert main(f"merge {NAME} {adapter} {tmp_path}/merged".split()) == 0
    assert models.load(tmp_path / "merged").tokenizer is not None
    assert main(["generate", "--model", "nobody/nothing", "--prompt", "a"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nobody/nothing is no directory here" in said and "`hf download nobody/nothing --local-dir DIR`" in said


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_not_whole_in_the_cache_is_fetched(
    missing: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = bytes_model(tmp_path / "whole")
    snapshot = cached(cache, bytes_model(tmp_path / "made"))
    (snapshot / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{NAME} is not whole, .*(no config.json|holds no safetensors)"):
        locate(NAME)
    asked: list[bool] = []
    usual = huggingface_hub.snapshot_download

    def fetch(*args: Any, local_files_only: bool, **options: Any) -> str:
        asked.append(local_files_only)
        return usual(*args, local_files_only=True, **options) if local_files_only else str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert locate(NAME) == (whole, NAME)
    assert asked == [True, False]


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "a/b/c", "a/b.gguf", "~/a", "../a"])
def test_what_is_no_name_of_a_repository_is_a_path(name: str, cache: Path):
    assert locate(name) == Located(Path(name).expanduser())
    with pytest.raises(CheckpointError, match=r"is not a directory with a model|no GGUF file|not a GGUF file"):
        models.load(name)


def test_a_directory_goes_before_a_repository(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached(cache, bytes_model(tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    bytes_model(tmp_path / NAME)
    assert locate(NAME) == (Path(NAME), "")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "lora_jax\[hub\]"'):
        locate(NAME)


def test_a_gguf_file_is_called_what_it_was_converted_from():
    assert _converted_from({"general.source.huggingface.repository": "org/model"}) == "org/model"
    assert _converted_from({"general.source.repo_url": "https://huggingface.co/org/model/"}) == "org/model"
    assert _converted_from({"general.source.url": "https://example.com/org/model"}) == ""
    assert _converted_from({"general.base_model.0.repo_url": "https://huggingface.co/org/base"}) == ""


def test_a_model_in_a_package_has_the_name_that_it_has_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("lora_jax.models.locate.packaged", lambda name: tmp_path / f"{name}.gguf")
    assert locate("smollm2") == (tmp_path / "smollm2.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
