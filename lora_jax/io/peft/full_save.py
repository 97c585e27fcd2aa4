"""Whole tensors on their way into a PEFT adapter: what trained in full, and tables of the base where asked for."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.adapter.site import Site, Sites
from lora_jax.adapter.updates import Replace
from lora_jax.errors import CheckpointError, ParameterError
from lora_jax.io.names import layouts
from lora_jax.io.names.names import Names
from lora_jax.io.names.torch_model import TorchModel, is_tied, tensor_name
from lora_jax.io.peft.files import EMBEDDINGS
from lora_jax.io.peft.tokens import SUFFIX, whole_tensors
from lora_jax.methods import Rows


class WholeWriter:
    """The tensors that are written whole.

    Attributes:
      saved: arrays by the name they have in PyTorch.
      ties: whether a table is saved for both of its uses.
      tokens: numbers of trained rows by the module that holds their table; PEFT ties them as the model ties the table.
    """

    def __init__(self, whole: Mapping[str, Replace | Rows], names: Names, sites: Sites, leaves: Mapping[str, Any]):
        self.names, self.sites, self.leaves = names, sites, leaves
        self.saved: dict[str, np.ndarray] = {}
        self.ties = False
        self.tokens: dict[str, list[int]] = {}
        for path, update in whole.items():
            self._add(path, update)

    def _add(self, path: str, update: Replace | Rows) -> None:
        name = tensor_name(self.names, path, update.site)
        if isinstance(update, Rows):
            module = name.rpartition(".")[0]
            self.saved[module + SUFFIX] = np.asarray(update.value).reshape(len(update.rows), -1)
            self.tokens[module] = list(update.rows)
            return
        self.saved[name] = self._weight(update.site, np.asarray(update.value))
        if is_tied(update.site):
            head = self.names.tied.get(name.rpartition(".")[0])
            if head is None:
                raise untied(update.site, name.rpartition(".")[0])
            self.saved[f"{head}.weight"] = self.saved[name]
            self.ties = True

    def _weight(self, site: Site, value: np.ndarray) -> np.ndarray:
        if site.kind == "full" and value.ndim > 1 and not site.path.endswith("/bias"):
            raise CheckpointError(
                f"{site.path!r} has shape {value.shape}, and no site says how it is used, so its layout in PyTorch is "
                f"unknown. Pass sites=, or leave it out of the export: adapter.without({site.path!r})"
            )
        transposed = layouts.is_transposed(site, self.names.fan_in_fan_out)
        return layouts.weight_to_torch(site, value, transposed=transposed)

    def config(self, torch_model: TorchModel, adapted: Collection[str]) -> tuple[list[str], str]:
        """`modules_to_save` and `bias` that make PEFT load the tensors; modules are completed from the base.

        Args:
          torch_model: every name of the model.
          adapted: modules that have factors.
        """
        owners: dict[str, set[str]] = {}
        for name in whole_tensors(self.saved):
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(owner, set()).add(leaf)
        biases = {owner for owner, leaves in owners.items() if leaves == {"bias"}}
        # With ensure_weight_tying PEFT adds the head of a saved table by itself.
        heads = {self.names.tied.get(owner) for owner in owners} if self.ties else set()
        modules = sorted(owners.keys() - biases - heads)
        for owner in modules:
            self._complete(owner)
            _check_alone(owner, (torch_model.known() | {*adapted} | {*modules}) - heads)
        return modules, "none" if not biases else "lora_only" if biases <= {*adapted} else "all"

    def _complete(self, owner: str) -> None:
        """PEFT saves modules whole, so what was not trained of one is written as it is in the base."""
        for path in self.leaves or self.sites.all_paths:
            site = self.sites.get(path)
            try:
                name = tensor_name(self.names, path, site)
            except ValueError:
                continue
            if name.rpartition(".")[0] == owner and name not in self.saved:
                value = self._base(path)
                full = site or Site(path=path, shape=value.shape, dtype=str(value.dtype), kind="full")
                self.saved[name] = self._weight(full, value)

    def tables(self, torch_model: TorchModel) -> dict[str, np.ndarray]:
        """The base's look-up tables and output heads, of the names that PEFT knows for them."""
        wanted = {
            name: site for name, ((site, _), *_) in torch_model.modules.items()
            if not site.batch_axes and (site.kind == "embedding" or site.head)
            and name.rpartition(".")[2] in EMBEDDINGS
        }  # fmt: skip
        if not wanted:
            raise CheckpointError(
                f"save_embedding_layers: no table or head here has a name that PEFT knows ({', '.join(EMBEDDINGS)}). "
                "Pass names= and sites=, or train the tables in full."
            )
        return {f"{name}.weight": self._weight(site, self._base(site.path)) for name, site in wanted.items()}

    def resized(self, base_model: str | None) -> bool:
        """Whether a local base model says that its vocabulary has another size than every table here."""
        path = Path(base_model or "") / "config.json"
        if not base_model or not path.is_file():
            return False
        try:
            config = json.loads(path.read_text())
            size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is no config of a model ({error}), so it tells no vocab_size") from None
        tables = [site.fan_in for site in self.sites.values() if site.kind == "embedding"]
        return size is not None and bool(tables) and size not in tables

    def _base(self, path: str) -> np.ndarray:
        leaf = self.leaves.get(path)
        if leaf is None or isinstance(leaf, jax.ShapeDtypeStruct):
            raise ParameterError(f"The value of {path!r} is to be written too: pass params=, with arrays")
        return np.asarray(leaf)


def untied(site: Site, module: str) -> CheckpointError:
    """The error for a table of two uses whose head has no name."""
    return CheckpointError(
        f"{site.path!r} is look-up table and output head at once, and PEFT would apply the update to the look-up only. "
        f"If PyTorch's model ties them too, name its head: Names(tied={{{module!r}: 'lm_head'}}); or do not adapt it."
    )


def _check_alone(owner: str, others: set[Any]) -> None:
    """PEFT's `modules_to_save` also takes every module whose name merely ends alike, and shields what is inside."""
    for other in sorted(others - {owner}):
        if other.endswith(owner) or re.match(rf"(^|.*\.){owner}($|\..*)", other):
            raise CheckpointError(
                f"{owner!r} is trained in full, and PEFT would take {other!r} for it too, because modules_to_save "
                "matches the ends of names. Rename it in PyTorch, or leave one of them out of the export."
            )
