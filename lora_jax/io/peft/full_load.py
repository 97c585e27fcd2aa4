"""Whole tensors of a PEFT adapter on their way into a JAX model: `modules_to_save`, biases, saved embeddings."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapter.site import Site, Sites, full_site
from lora_jax.adapter.updates import Replace, Update
from lora_jax.errors import CheckpointError
from lora_jax.io.names import layouts
from lora_jax.io.names.names import Names
from lora_jax.io.names.torch_model import TorchModel, is_tied
from lora_jax.io.peft.config import setting
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.match import saves
from lora_jax.io.peft.tokens import token_indices, tokens_by_module, whole_tensors
from lora_jax.methods import Rows


class WholeReader:
    """The whole tensors of one adapter, and what of them has no place.

    Attributes:
      unexpected: tensors that the model does not have.
      mismatched: tensors that are shaped differently, with both shapes.
    """

    def __init__(
        self, files: PeftFiles, leaves: Mapping[str, Any], sites: Sites, names: Names, torch_model: TorchModel
    ):
        self.files, self.leaves, self.sites, self.torch_model = files, leaves, sites, torch_model
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
        tokens = tokens_by_module(self.files.saved)
        for name, array in whole_tensors(self.files.saved).items():
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
        alone = is_tied(self._site(path)) and self._asked(name) and not self._has_both(name)
        if alone or (path in found and not np.array_equal(found[path][1], value)):
            raise CheckpointError(
                f"{self.files.where} trains {name} for one of its uses, but here {path!r} is one table for look-up and "
                "output head. PEFT keeps them together only if trained with ensure_weight_tying=True."
            )

    def _has_both(self, name: str) -> bool:
        """Whether the file has the table of a look-up and that of the head which is tied to it."""
        pairs = [pair for pair in self.embeddings.items() if name in pair]
        return any(other in self.files.saved for pair in pairs for other in pair if other != name)

    def _replace(self, path: str, value: np.ndarray) -> Replace:
        dtype = jnp.promote_types(self.leaves[path].dtype, jnp.float32)
        return Replace(jnp.asarray(np.asarray(value, order="C"), dtype), self._site(path))


def _same_rows(update: Update, value: Any, numbers: tuple[int, ...]) -> bool:
    return isinstance(update, Rows) and update.rows == numbers and np.array_equal(update.value, value)
