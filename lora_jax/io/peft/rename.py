"""An adapter under the names that a model has for its modules, where the file has others for them."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lora_jax.errors import CheckpointError
from lora_jax.io.formats.resolve import is_flat, resolve
from lora_jax.io.peft.config import LORA, peft_type_of, setting
from lora_jax.io.peft.files import PeftFiles, table_name
from lora_jax.io.peft.match import exact_key


def resolved(files: PeftFiles, known: Collection[str]) -> PeftFiles:
    """The same adapter with the model's names, and every module's own scale; see `lora_jax.io.formats.resolve`.

    Args:
      files: an adapter. One that is no LoRA, or adapts parameters by themselves, is left as it is.
      known: the model's modules.

    Raises:
      CheckpointError: a name means several modules, or several names mean one.

    Example:
      >>> import numpy as np
      >>> from lora_jax.io.peft.module import Module
      >>> ones = Module("linear", np.ones((2, 4)), np.ones((3, 2)))
      >>> found = resolved(PeftFiles({"r": 2, "alpha_pattern": {"^unet\\\\.q": 6}}, {"unet.q": ones}), ["model.q"])
      >>> list(found.modules), found.scale("model.q")
      (['model.q'], 3.0)
    """
    if peft_type_of(files.config) is not LORA or any(each.kind == "parameter" for each in files.modules.values()):
        return files
    owners = {name: table_name(name).rpartition(".")[0] for name in files.saved}
    names = resolve(files.where, dict.fromkeys((*files.modules, *owners.values())), known)
    if not names:
        return files
    return replace(
        files,
        config=_config(files, names),
        modules={names.get(name, name): module for name, module in files.modules.items()},
        saved={_moved(name, owners[name], names): value for name, value in files.saved.items()},
        unscaled=frozenset(names.get(name, name) for name in files.unscaled),
    )


def check_names(files: PeftFiles) -> None:
    """Refuse to write names that no model has: kohya's, which only a model can take apart.

    Raises:
      CheckpointError: there are some.
    """
    if flat := sorted(name for name in files.modules if is_flat(name)):
        raise CheckpointError(
            f"{files.where} has kohya's names, with _ for every dot ({flat[0]}), which no other program finds: give "
            "the model that takes them apart (--base for lora-jax compose, --like for convert), or merge it."
        )


def _moved(name: str, owner: str, names: Mapping[str, str]) -> str:
    return names.get(owner, owner) + name.removeprefix(owner)


def _config(files: PeftFiles, names: Mapping[str, str]) -> dict[str, Any]:
    """The config with patterns for the new names, as patterns of the file go by the old ones."""
    rank, alpha = files.config.get("r"), float(setting(files.config, "lora_alpha"))
    ranks = {name: files.rank(name) for name in files.modules}
    alphas = {name: files.alpha(name) for name in files.modules if name not in files.unscaled}
    fields: dict[str, Any] = {
        "rank_pattern": {exact_key(names.get(name, name)): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {exact_key(names.get(name, name)): each for name, each in alphas.items() if each != alpha},
    }
    targets = files.config.get("target_modules")
    if isinstance(targets, list):
        fields["target_modules"] = [names.get(each, each) for each in targets]
    return {**files.config, **fields}
