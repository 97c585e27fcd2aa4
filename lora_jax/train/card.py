"""The card of an adapter: what it was made of and how, for people, as README.md beside it."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

_USE = """\
```python
import lora_jax as lora
from lora_jax import models

model = models.load({base})
sites = lora.find_sites(model.apply, model.params, tokens)
adapter = lora.peft.load("adapter", model.params, sites)
logits = lora.adapt(model.apply)(model.params, adapter, tokens)
```

It is in PEFT's format, so PEFT, transformers and vLLM read it too."""


def card(record: Mapping[str, Any], losses: Mapping[str, float]) -> str:
    r"""Write a model card.

    Args:
      record: what `config.json` of the run holds.
      losses: by what they are of; those that are not known are left out.

    Example:
      >>> record = {"model": {"name": "org/base"}, "options": {"task": "sft"}, "data": {"a": "0f"}, "versions": {}}
      >>> print(*card(record, {"held out": 1.25}).splitlines()[:6], sep="\n")
      ---
      base_model: org/base
      library_name: peft
      tags:
      - lora
      - lora_jax
    """
    base = str(record["model"]["name"])
    rows = [(f"loss, {name}", f"{value:.4f}") for name, value in losses.items()]
    rows += [(name, _shown(value)) for name, value in _flat(record["options"]) if value not in (None, [], "")]
    files = [f"- `{name}`, sha256 `{digest}`" for name, digest in record["data"].items()]
    return "\n".join([
        "---",
        f"base_model: {base if _is_name(base) else json.dumps(base)}",
        "library_name: peft",
        "tags:",
        "- lora",
        "- lora_jax",
        "---",
        "",
        f"# A LoRA adapter for {base}",
        "",
        _USE.format(base=json.dumps(base)),
        "",
        "Trained on",
        "",
        *files,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        *(f"| {name} | {value} |" for name, value in record["versions"].items()),
        "",
    ])  # fmt: skip


def _is_name(base: str) -> bool:
    return shlex.quote(base) == base


def _flat(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options of all groups."""
    found: list[tuple[str, Any]] = []
    for name, value in options.items():
        found += _flat(value) if isinstance(value, Mapping) else [(name, value)]
    return found


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
