"""Adapters on the Hugging Face Hub: `lora_jax.hub.download` and `lora_jax.hub.push` (extra `[hub]`)."""

import re
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.io.formats.recognise import FILES
from lora_jax.io.hf.snapshot import hub, snapshot
from lora_jax.io.inspect import Contents, inspect
from lora_jax.io.peft.config import CONFIG
from lora_jax.io.peft.keys import WEIGHTS
from lora_jax.jsonfile import read_object
from lora_jax.regular import copyable

__all__ = ["card", "download", "push"]

_CARD = "README.md"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# PEFT's two files and what other tools call theirs, or all of an Orbax checkpoint.
_WANTED = (
    *FILES, CONFIG, "adapter_model.bin",
    "_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "state/*",
)  # fmt: skip


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """Fetch an adapter from the Hub into the cache that all of Hugging Face's libraries share.

    Only the adapter's own files are fetched, whatever else the repository holds. What is in the cache already is not
    fetched again.

    Args:
      repo_id: `user/name`.
      revision: branch, tag or commit; the main branch by default.
      subfolder: directory of the adapter inside the repository.
      cache_dir: the cache; `HF_HOME` decides by default.
      local_files_only: never use the network.
      token: for private repositories; by default the one that `hf auth login` stored.

    Returns:
      The adapter's directory, for `lora_jax.peft.load`, `lora_jax.load` or `lora_jax.peft.merge_checkpoint`.

    Raises:
      CheckpointError: there is no such repository or revision, it cannot be reached, or it holds no adapter.
      ImportError: huggingface_hub is not installed.

    Example:
      >>> folder = download("user/my-adapter", revision="v2")  # doctest: +SKIP
      >>> adapter = lora_jax.peft.load(folder, params, sites)  # doctest: +SKIP
    """
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    root = snapshot(
        repo_id, [f"{inside}{name}" for name in _WANTED], revision=revision, cache_dir=cache_dir,
        local_files_only=local_files_only, token=token,
    )  # fmt: skip
    folder = root / inside
    if not _holds_adapter(folder):
        raise CheckpointError(
            f"{repo_id!r} holds no adapter{f' in {subfolder!r}' if subfolder else ''}: neither {WEIGHTS} nor a "
            "checkpoint of lora_jax. If it has adapters in subdirectories, pass subfolder=..."
        )
    return folder


def push(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    message: str = "Upload adapter",
    token: str | None = None,
) -> str:
    """Upload an adapter's directory with a model card.

    A `README.md` in the directory is taken as it is; otherwise `card` writes one. The directory is not changed.

    Args:
      folder: what `lora_jax.peft.save` or `lora_jax.save` wrote.
      repo_id: `user/name`; the repository is created if there is none.
      base_model: the base's repository, for the card; by default what `adapter_config.json` says.
      private: whether a new repository is private; by default what the account says.
      message: of the commit.
      token: with the right to write; by default the one that `hf auth login` stored.

    Returns:
      The address of the commit.

    Raises:
      CheckpointError: there is no adapter in `folder`, or the Hub refuses the upload.
      ImportError: huggingface_hub is not installed.

    Example:
      >>> push("my-adapter", "user/my-adapter", base_model="meta-llama/Llama-3.2-1B")  # doctest: +SKIP
      'https://huggingface.co/user/my-adapter/commit/...'
    """
    package, source = hub(), Path(folder).expanduser()
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is not a directory. Give the one that lora_jax.peft.save or lora_jax.save wrote."
        )
    text = None if (source / _CARD).exists() else card(source, repo_id, base_model=base_model)
    api = package.HfApi(token=token, library_name="lora_jax")
    with tempfile.TemporaryDirectory() as staging:
        whole = Path(staging) / "adapter"
        for file in copyable(source, [each.relative_to(source) for each in source.rglob("*") if not each.is_dir()]):
            (whole / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, whole / file)
        if text is not None:
            (whole / _CARD).write_text(text, encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=whole, commit_message=message)
        except (package.errors.HfHubHTTPError, package.errors.HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"The Hub refused {repo_id!r}: {reason} Check the name, and run: hf auth login"
            ) from error
    return str(commit.commit_url)


def card(folder: str | PathLike[str], repo_id: str = "user/adapter", *, base_model: str | None = None) -> str:
    """Write a model card: what the adapter holds and how it is loaded.

    Args:
      folder: what `lora_jax.peft.save` or `lora_jax.save` wrote.
      repo_id: where the adapter will be.
      base_model: the base's repository; by default what `adapter_config.json` says.

    Raises:
      CheckpointError: there is no adapter in `folder`.
      ImportError: huggingface_hub is not installed.

    Example:
      >>> import tempfile, numpy as np
      >>> from lora_jax.io.peft import Module, PeftFiles, write_peft
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> modules = {"q": Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))}
      >>> write_peft(folder, PeftFiles({"r": 2, "target_modules": ["q"]}, modules))
      >>> print(card(folder, "user/mine", base_model="org/base").split("---")[1].strip())
      base_model: org/base
      library_name: peft
      tags:
      - lora
      - lora_jax
    """
    package, source = hub(), Path(folder).expanduser()
    found = inspect(source)
    config = read_object(source / CONFIG) or {}
    named = str(config.get("base_model_name_or_path") or "")
    # A directory of this machine says nothing to others, and the Hub refuses it.
    base = base_model or (named if _REPOSITORY.fullmatch(named) else None)
    library = "peft" if found.format == "peft" else "lora_jax"
    data = package.ModelCardData(base_model=base, library_name=library, tags=["lora", "lora_jax"])
    return f"---\n{data.to_yaml()}\n---\n\n{_text(found, repo_id, base)}"


def _text(found: Contents, repo_id: str, base: Any) -> str:
    ranks = sorted({entry.rank for entry in found.entries if entry.rank is not None})
    reads = "lora.peft.load(folder, params, sites)" if found.format == "peft" else "lora.load(folder, params)"
    rows = [
        f"| `{entry.name}` | {entry.kind} | {'×'.join(map(str, entry.shape))} | {_shown(entry.rank)} | "
        f"{_shown(entry.alpha)} |"
        for entry in found.entries
    ]
    return "\n".join([
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"A LoRA adapter for {f'`{base}`' if base else 'a base model that its config does not name'}: "
        f"{len(found.entries)} {'modules' if found.format == 'peft' else 'parameters'}, "
        f"rank {' and '.join(map(str, ranks)) or 'none'}, {found.nbytes:,d} bytes.",
        "",
        "```python",
        "import lora_jax as lora",
        "",
        f'folder = lora.hub.download("{repo_id}")',
        f"adapter = {reads}",
        "```",
        "",
        "| name | kind | shape | rank | alpha |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _holds_adapter(folder: Path) -> bool:
    names = (*FILES, "adapter_model.bin", "_CHECKPOINT_METADATA")
    return any((folder / name).exists() for name in names)
