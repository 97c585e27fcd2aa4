"""Adapters on the Hugging Face Hub, with a local cache and no network."""

import builtins
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import pytest
from helpers import assert_same, random_adapter

import lora_jax as lora

COMMIT = "a" * 40
PARAMS = {"q": {"kernel": jnp.ones((4, 3))}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def adapter() -> lora.Adapter:
    return random_adapter(lora.find_sites(lambda p, x: x @ p["q"]["kernel"], PARAMS, jnp.ones((2, 4))))


def cached(cache: Path, repo: str, content: Path, inside: str = "") -> Path:
    """Put a directory into a cache as a download of the main branch would have left it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(content, snapshot / inside)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("inside", ["", "nested/other"])
def test_peft_adapter_from_the_cache(inside: str, adapter: lora.Adapter, tmp_path: Path) -> None:
    lora.peft.save(tmp_path / "made", adapter)
    cached(tmp_path / "cache", "user/name", tmp_path / "made", inside)
    folder = lora.hub.download(
        "user/name", cache_dir=tmp_path / "cache", local_files_only=True, subfolder=inside or None
    )
    sites = lora.find_sites(lambda p, x: x @ p["q"]["kernel"], PARAMS, jnp.ones((2, 4)))
    assert_same(lora.peft.load(folder, PARAMS, sites), adapter)


def test_our_own_format_from_the_cache(adapter: lora.Adapter, tmp_path: Path) -> None:
    lora.save(tmp_path / "made", adapter, params=PARAMS)
    cached(tmp_path / "cache", "user/name", tmp_path / "made")
    assert_same(lora.load(lora.hub.download("user/name", cache_dir=tmp_path / "cache", local_files_only=True)), adapter)


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("user/absent", {}, "'user/absent' could not be fetched"),
        ("user/name", {"revision": "v9"}, "at revision 'v9' could not be fetched"),
        ("user/name/too/deep", {}, "could not be fetched"),
        ("user/name", {}, "holds no adapter"),
        ("user/name", {"subfolder": "elsewhere"}, "holds no adapter in 'elsewhere'"),
    ],
)
def test_what_cannot_be_fetched(repo: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    cached(tmp_path / "cache", "user/name", tmp_path / "empty")
    with pytest.raises(lora.CheckpointError, match=message):
        lora.hub.download(repo, cache_dir=tmp_path / "cache", local_files_only=True, **options)


class FakeApi:
    """Remembers what would have been uploaded."""

    uploads: list[dict[str, Any]]

    def __init__(self, **options: Any):
        self.options = options

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        if repo_id == "forbidden/name":
            raise OSError("403 Forbidden")
        self.created = (repo_id, private, exist_ok)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        files = {
            str(file.relative_to(folder_path)): file.read_bytes() for file in folder_path.rglob("*") if file.is_file()
        }
        FakeApi.uploads.append({"repo": self.created, "files": files, "message": commit_message, **self.options})
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    FakeApi.uploads = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi.uploads


@pytest.mark.parametrize("own_card", [False, True])
def test_push(own_card: bool, adapter: lora.Adapter, uploads: list[dict[str, Any]], tmp_path: Path) -> None:
    lora.peft.save(tmp_path / "made", adapter, base_model="org/base")
    if own_card:
        (tmp_path / "made" / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    address = lora.hub.push(tmp_path / "made", "user/name", private=True, token="secret", message="First")
    assert address == "https://hub/user/name/commit/1"
    (upload,) = uploads
    assert (upload["repo"], upload["message"], upload["token"]) == (("user/name", True, True), "First", "secret")
    card = upload["files"].pop("README.md").decode()
    assert upload["files"] == {name: content for name, content in before.items() if name != "README.md"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == before
    assert (card == "mine") == own_card
    assert own_card or 'lora.hub.download("user/name")' in card


@pytest.mark.parametrize(("format_", "reads"), [("peft", "lora.peft.load("), ("orbax", "lora.load(")])
def test_card_says_what_is_inside(format_: str, reads: str, adapter: lora.Adapter, tmp_path: Path) -> None:
    save: Any = lora.peft.save if format_ == "peft" else lora.save
    save(tmp_path / "made", adapter)
    card = huggingface_hub.ModelCard(lora.hub.card(tmp_path / "made", "user/name", base_model="org/base"))
    assert (card.data.base_model, card.data.tags) == ("org/base", ["lora", "lora_jax"])
    assert card.data.library_name == ("peft" if format_ == "peft" else "lora_jax")
    assert reads in card.text
    assert "rank 2" in card.text


@pytest.mark.parametrize(("base", "shown"), [("org/base", "org/base"), ("gpt2", "gpt2"), ("/home/me/base", None)])
def test_card_names_a_base_that_others_can_find(
    base: str, shown: str | None, adapter: lora.Adapter, tmp_path: Path
) -> None:
    lora.peft.save(tmp_path / "made", adapter, base_model=base)
    assert huggingface_hub.ModelCard(lora.hub.card(tmp_path / "made")).data.base_model == shown


def test_only_the_adapters_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted: list[str] = []

    def record(repo_id: str, allow_patterns: list[str], **options: Any) -> str:
        wanted.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    with pytest.raises(lora.CheckpointError, match="holds no adapter"):
        lora.hub.download("user/name", subfolder="sub")
    assert "sub/adapter_model.safetensors" in wanted
    assert {pattern.partition("/")[0] for pattern in wanted} == {"sub"}
    assert "sub/*" not in wanted


def test_push_that_is_refused(adapter: lora.Adapter, uploads: list[dict[str, Any]], tmp_path: Path) -> None:
    lora.peft.save(tmp_path / "made", adapter)
    with pytest.raises(lora.CheckpointError, match="refused 'forbidden/name': 403 Forbidden"):
        lora.hub.push(tmp_path / "made", "forbidden/name")
    with pytest.raises(lora.CheckpointError, match="not a directory"):
        lora.hub.push(tmp_path / "made" / "adapter_model.safetensors", "user/name")
    with pytest.raises(lora.CheckpointError, match="neither a PEFT adapter"):
        lora.hub.push(tmp_path, "user/name")
    assert not uploads


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[hub\]"'):
        lora.hub.download("user/name")
