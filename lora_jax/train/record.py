"""What a run depends on, as `config.json` holds it: every option, the model, the data, the versions; and YAML files."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_jax.config.config import LoraConfig
from lora_jax.errors import LoraError
from lora_jax.paths import named_leaves

_POWER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_PACKAGES = ("lora_jax", "jax", "jaxlib", "optax", "numpy")


class ConfigFileError(LoraError, ValueError):
    """A file of options that cannot be read."""


def record(
    options: Mapping[str, Any], config: LoraConfig, model: Mapping[str, Any], data: Mapping[str, str]
) -> dict[str, Any]:
    """What `config.json` holds.

    Args:
      options: resolved, of the command.
      config: of the adapter.
      model: of `described`.
      data: sha256 of each file.
    """
    return {
        "options": dict(options),
        "model": dict(model),
        "lora": asdict(config),
        "data": dict(data),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def described(model: Any, made: Path | None = None) -> dict[str, Any]:
    """What a model is, so that another one in its place is seen: the names, sizes and beginnings of its files.

    Args:
      model: of `lora_jax.models`.
      made: where the built-in model is kept, under a name that says all that it depends on.
    """
    facts = {
        "model_type": str(model.source.get("model_type", "")),
        "parameters": sum(leaf.size for leaf in named_leaves(model.params)[0].values()),
    }
    if made is not None:
        return {"name": str(made), **facts, "sha256": made.name}
    directory = Path(model.directory)
    inside = [directory] if directory.is_file() else directory.iterdir()
    files = sorted(path for path in inside if path.suffix in (".safetensors", ".json", ".gguf", ".jinja"))
    listed = {path.name: [path.stat().st_size, _digest(path)] for path in files}
    digest = sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return {"name": model.name, **facts, "sha256": digest}


def _digest(path: Path) -> str:
    """Of a small file all of it counts, of a large one its beginning: a header of safetensors says what is in it."""
    with path.open("rb") as file:
        return sha256(file.read(1 << 20)).hexdigest()


def read_options(path: Path) -> dict[str, Any]:
    """Options out of a YAML file, or out of the `config.json` of a run.

    Raises:
      ConfigFileError: it cannot be read, or is none.
      ImportError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('--config needs PyYAML: pip install "lora_jax[cli]"') from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigFileError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigFileError(f"{path} is no YAML file of options: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigFileError(f"{path} must hold options and their values, such as `rank: 16`")
    options = found.get("options", found)
    if not isinstance(options, dict):
        raise ConfigFileError(f"{path}: options must be names and their values, such as `rank: 16`")
    return {str(name).replace("-", "_"): _number(value) for name, value in options.items()}


def _number(value: Any) -> Any:
    """A value as people mean it: 2e-4 is a text to YAML, which wants a point in it."""
    if isinstance(value, dict):
        return {name: _number(each) for name, each in value.items()}
    return float(value) if isinstance(value, str) and _POWER.fullmatch(value) else value
