"""What a PEFT file holds beside factors, both ways: `modules_to_save`, biases, trained tokens, saved embeddings."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.site import Site, Sites, full_site
from lora_jax.adapter.updates import Replace, Update
from lora_jax.dtypes import promoted
from lora_jax.errors import CheckpointError, ParameterError
from lora_jax.io.names import layouts
from lora_jax.io.names.names import Names
from lora_jax.io.names.torch_model import TorchModel, is_tied, stacked, tensor_name
from lora_jax.io.peft.config import setting
from lora_jax.io.peft.files import EMBEDDINGS, TOKEN_ROWS, PeftFiles, full_tensors, token_indices, token_rows
from lora_jax.io.peft.match import saves
from lora_jax.jsonfile import read_object
from lora_jax.methods import Rows


class FullTensorReader:
    """From the full tensors of one file to updates, and what of them has no place.

    Attributes:
      unexpected: tensors that the model does not have.
      mismatched: tensors that are shaped differently, with both shapes.
    """

    def __init__(
        self, files: PeftFiles, leaves: Mapping[str, Any], sites: Sites, names: Names, torch_model: TorchModel
    ):
        self.files, self.leaves, self.sites, self.torch_model, self.names = files, leaves, sites, torch_model, names
        self.embeddings = {f"{head}.weight": f"{embedding}.weight" for embedding, head in names.tied.items()}
        self.transposed = bool(setting(files.config, "fan_in_fan_out"))
        self.unexpected: list[str] = []
        self.mismatched: list[str] = []

    def updates(self, adapted: Collection[str]) -> dict[str, Update]:
        """A `Replace` by path for what the config trains in full, and for tables that are not the base's; and `Rows`.

        Args:
          adapted: paths that have factors.
        """
        found: dict[str, tuple[str, np.ndarray]] = {}
        tokens = token_rows(self.files.saved)
        for name, array in full_tensors(self.files.saved).items():
            path = self._path(name)
            value = None if path is None else self._value(name, path, array)
            if path is None or value is None or not (self._asked(name) or self._changed(name, path, value)):
                continue
            self._check_alone(name, path, value, adapted, found)
            found[path] = (name, value)
        updates: dict[str, Update] = {path: self._replace(path, value) for path, (_, value) in found.items()}
        for module, rows in tokens.items():
            self._add_rows(module, rows, adapted, updates)
        return updates

    def _add_rows(self, module: str, rows: np.ndarray, adapted: Collection[str], updates: dict[str, Update]) -> None:
        """Trained rows of a look-up table; those of a head that is tied to it are the same."""
        path = self._path(f"{module}.weight")
        if path is None:
            return
        site, numbers = self._site(path), token_indices(self.files.where, self.files.config, module, rows)
        if site.kind != "embedding" or site.batch_axes or rows.shape[1:] != (site.fan_out,):
            self.mismatched.append(
                f"{module} has trained rows of shape {rows.shape}, and {path} is {site.kind} {site.shape}"
            )
            return
        if max(numbers) >= site.fan_in:
            raise CheckpointError(f"{self.files.where}: row {max(numbers)} of {path!r}, which has {site.fan_in} rows")
        value = jnp.asarray(rows.astype(np.float32).reshape(-1, *site.sizes(site.out_axes)))
        known = updates.get(path)
        if path in adapted or (known is not None and not _same_rows(known, value, numbers)):
            raise CheckpointError(
                f"{self.files.where} trains rows of {module}, and {path!r} has another update too: a parameter holds "
                "one. Save them as two adapters."
            )
        updates[path] = Rows(value, site, numbers)

    def _path(self, name: str) -> str | None:
        path = self.torch_model.tensors.get(name) or self.torch_model.tensors.get(self.embeddings.get(name, ""))
        if path is None:
            self._note(name)
        return path

    def _note(self, name: str) -> None:
        """A tensor without a parameter: the model has none, or has it in parts, or with other numbers."""
        module = name.rpartition(".")[0]
        parts = [place.site.path for place in self.torch_model.modules.get(module, ())]
        if not parts or f"{module}.weight" in self.torch_model.tensors:
            self.unexpected.append(name)
        else:
            self.mismatched.append(
                f"{name} is one tensor, and {', '.join(parts)} here, stacked, fused or with other numbers: only "
                "factors are taken apart"
            )

    def _site(self, path: str) -> Site:
        leaf = self.leaves[path]
        return self.sites.get(path) or full_site(path, leaf)

    def _value(self, name: str, path: str, array: np.ndarray) -> np.ndarray | None:
        site = self._site(path)
        transposed = layouts.is_transposed(site, self.transposed)
        wanted = layouts.weight_to_torch(site, np.empty(site.shape, np.bool_), transposed=transposed).shape
        if array.shape != wanted:
            self.mismatched.append(f"{name} has shape {array.shape}, where {path} needs {wanted}")
            return None
        return layouts.weight_from_torch(site, array, transposed=transposed)

    def _asked(self, name: str) -> bool:
        """Whether the config trains the tensor in full, so that it is an update even where it equals the base."""
        return saves(self.files.config.get("modules_to_save"), name) or name.endswith(".bias")

    def _changed(self, name: str, path: str, value: np.ndarray) -> bool:
        leaf = self.leaves[path]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            if name.rpartition(".")[0] in self.files.modules:
                # PEFT writes the base's own table beside its factors, and leaves it as it is.
                return False
            raise CheckpointError(
                f"{self.files.where}: {name} is a whole table of the base (save_embedding_layers), and abstract "
                "parameters do not tell whether it changed: pass arrays."
            )
        return not np.array_equal(np.asarray(leaf), value.astype(np.asarray(leaf).dtype))

    def _check_alone(
        self,
        name: str,
        path: str,
        value: np.ndarray,
        adapted: Collection[str],
        found: Mapping[str, tuple[str, np.ndarray]],
    ) -> None:
        """A table has one value here: factors beside it, and another value for its other use, have no place."""
        if path in adapted:
            raise CheckpointError(
                f"{self.files.where}: {name} is the base's own table (save_embedding_layers), it differs from "
                f"{path!r}, and factors are stored for it too. Put that table into the parameters first."
            )
        tied = is_tied(self._site(path), self._table(name), self.names, self.torch_model)
        alone = tied and self._asked(name) and not self._has_both(name)
        if alone or (path in found and not np.array_equal(found[path][1], value)):
            raise CheckpointError(
                f"{self.files.where} trains {name} for one of its uses, but here {path!r} is one table for look-up and "
                "output head. PEFT keeps them together only if trained with ensure_weight_tying=True."
            )

    def _table(self, name: str) -> str:
        """The module of a table, for its own tensor and for that of a head which is tied to it."""
        return self.embeddings.get(name, name).rpartition(".")[0]

    def _has_both(self, name: str) -> bool:
        """Whether the file has the table of a look-up and that of the head which is tied to it."""
        pairs = [pair for pair in self.embeddings.items() if name in pair]
        return any(other in self.files.saved for pair in pairs for other in pair if other != name)

    def _replace(self, path: str, value: np.ndarray) -> Replace:
        dtype = promoted(self.leaves[path].dtype, jnp.float32)
        return Replace(jnp.asarray(np.asarray(value, order="C"), dtype), self._site(path))


def _same_rows(update: Update, value: Any, numbers: tuple[int, ...]) -> bool:
    return isinstance(update, Rows) and update.rows == numbers and np.array_equal(update.value, value)


class FullTensorWriter:
    """From updates to the tensors that a file holds in full.

    Attributes:
      saved: arrays by the name they have in PyTorch.
      ties: whether a table is saved for both of its uses.
      tokens: numbers of trained rows by the module that holds their table; PEFT ties them as the model ties the table.
    """

    def __init__(
        self,
        full: Mapping[str, Replace | Rows],
        names: Names,
        sites: Sites,
        leaves: Mapping[str, Any],
        torch_model: TorchModel,
    ):
        self.torch_model = torch_model
        self.names, self.sites, self.leaves, self.stacks = names, sites, leaves, stacked(sites)
        self.saved: dict[str, np.ndarray] = {}
        self.ties = False
        self.tokens: dict[str, list[int]] = {}
        for path, update in full.items():
            self._add(path, update)

    def _add(self, path: str, update: Replace | Rows) -> None:
        name = tensor_name(self.names, path, update.site, self.stacks)
        if isinstance(update, Rows):
            module = name.rpartition(".")[0]
            self.saved[module + TOKEN_ROWS] = np.asarray(update.value).reshape(len(update.rows), -1)
            self.tokens[module] = list(update.rows)
            return
        self.saved[name] = self._weight(update.site, np.asarray(update.value))
        module = name.rpartition(".")[0]
        if is_tied(update.site, module, self.names, self.torch_model):
            head = self.names.tied.get(module)
            if head is None:
                raise untied(update.site, module)
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

    def config(self, torch_model: TorchModel, adapted: Collection[str], *, complete: bool) -> tuple[list[str], str]:
        """`modules_to_save` and `bias` that make PEFT load the tensors; modules are completed from the base.

        Args:
          torch_model: every name of the model.
          adapted: modules that have factors.
          complete: whether those names are all that the model has.
        """
        owners: dict[str, set[str]] = {}
        for name in full_tensors(self.saved):
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(owner, set()).add(leaf)
        biases = {owner for owner, leaves in owners.items() if leaves == {"bias"}}
        # With ensure_weight_tying PEFT adds the head of a saved table by itself.
        heads = {self.names.tied.get(owner) for owner in owners} if self.ties else set()
        whole = sorted(owners.keys() - biases - heads)
        for owner in whole:
            self._complete(owner)
        modules = _joined(whole, torch_model.owners() - heads | {*adapted}) if complete else whole
        for owner in modules:
            others = (torch_model.known() | {*adapted} | {*whole}) - heads
            # Nothing but what is saved too is inside a module that stands for several.
            inside = set() if owner in whole else {name for name in others if name.startswith(f"{owner}.")}
            _check_alone(owner, others - inside)
        return modules, "none" if not biases else "lora_only" if biases <= {*adapted} else "all"

    def _complete(self, owner: str) -> None:
        """PEFT saves modules whole, so what was not trained of one is written as it is in the base."""
        for path in self.leaves or self.sites.all_paths:
            site = self.sites.get(path)
            try:
                name = tensor_name(self.names, path, site, self.stacks)
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
        config = (read_object(path) if base_model else None) or {}
        nested = config.get("text_config", {})
        if not isinstance(nested, dict):
            raise CheckpointError(f"{path} is no config of a model: text_config={nested!r} must be an object")
        size = config.get("vocab_size", nested.get("vocab_size"))
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


def _joined(modules: Collection[str], known: Collection[str]) -> list[str]:
    """Modules that are trained in full, by the name of the one around several of which nothing else is known.

    >>> _joined(["head.dense", "head.out", "norm"], ["head.dense", "head.out", "norm", "layer.q"])
    ['head', 'norm']
    """
    inside: dict[str, set[str]] = {}
    for name in known:
        parts = name.split(".")
        for end in range(1, len(parts)):
            inside.setdefault(".".join(parts[:end]), set()).add(name)
    parents = {
        parent for parent, held in inside.items() if len(held) > 1 and parent not in known and held <= {*modules}
    }
    outer = [parent for parent in parents if not any(parent.startswith(f"{other}.") for other in parents)]
    alone = [name for name in modules if not any(name.startswith(f"{parent}.") for parent in outer)]
    return sorted([*outer, *alone])


def _check_alone(owner: str, others: set[Any]) -> None:
    """PEFT's `modules_to_save` also takes every module whose name merely ends alike, and shields what is inside."""
    for other in sorted(others - {owner}):
        if other.endswith(owner) or re.match(rf"(^|.*\.){owner}($|\..*)", other):
            raise CheckpointError(
                f"{owner!r} is trained in full, and PEFT would take {other!r} for it too, because modules_to_save "
                "matches the ends of names. Rename it in PyTorch, or leave one of them out of the export."
            )
