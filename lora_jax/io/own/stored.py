"""What the files of a checkpoint claim to hold, looked at before any array is read: shapes, and bytes beside bytes."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import tensorstore  # Orbax stores through it

from lora_jax.errors import CheckpointError

_ZEROS = 1 << 28
"""Bytes of arrays that may be all zeros, which take next to nothing on disk."""
_COMPRESSED = 100
"""How many times smaller than its arrays a checkpoint may be; factors that were trained hardly compress."""
_LONGEST = 1 << 20


def check_stored(shown: str, where: Any, expected: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]) -> None:
    """Refuse a checkpoint whose files hold other arrays than the manifest says, or claim more than they can.

    Orbax reads whatever is stored, so that a folder of 7 kB fills the memory.

    Args:
      shown: where it is, for error messages.
      where: where it is, a path of Orbax's, which may be one of remote storage.
      expected: the arrays by path and field.

    Raises:
      CheckpointError: names the arrays that differ.
    """
    names = {f"{path}.{field}": leaf for path, fields in expected.items() for field, leaf in fields.items()}
    found = dict(_arrays(where))
    wrong = [name for name, leaf in names.items() if name not in found or not _fits(found[name], leaf.shape)]
    if wrong:
        has = ascii(found[wrong[0]].get("shape"))[:60] if wrong[0] in found else "nothing"
        raise CheckpointError(
            f"{shown}: of {wrong[0]!r} ({len(wrong)} such) the files hold {has}, and the manifest says "
            f"{names[wrong[0]].shape}: it is damaged. Copy it again from where it was saved."
        )
    claimed = sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in names.values())
    there = _nbytes(where)
    if claimed > _ZEROS + _COMPRESSED * there:
        raise CheckpointError(
            f"{shown} says that its arrays have {claimed:,d} bytes, and its files have {there:,d}. It is damaged, or "
            "made to fill the memory: copy it again from where it was saved."
        )


def _arrays(where: Any) -> Iterator[tuple[str, Any]]:
    """The metadata of every array by name."""
    databases = list(where.glob("*/manifest.ocdbt"))
    if not databases:
        raise ValueError("manifest.ocdbt is missing")
    for database in databases:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": _address(f"{database.parent}/")}).result()
        for key in store.list().result():
            name, _, file = key.decode().rpartition("/")
            if file == "zarr.json":
                text = store.read(key).result().value
                if len(text) > _LONGEST:
                    raise ValueError(f"{len(text)} bytes about {name!r} are too many")
                yield name, json.loads(text)


def _nbytes(folder: Any) -> int:
    """Bytes of all files below a folder; paths of remote storage cannot be searched at once, and know no links."""
    if "://" in str(folder):
        return sum(_nbytes(each) if each.is_dir() else each.stat().length for each in folder.iterdir())
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _address(folder: str) -> Any:
    """A folder as tensorstore takes it; a path, unlike an address, may have any letters."""
    return folder if "://" in folder else {"driver": "file", "path": folder}


def _fits(array: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array has this shape, and is cut into pieces that are no larger."""
    pieces = array["chunk_grid"]["configuration"]["chunk_shape"]
    return array["shape"] == list(shape) and len(pieces) == len(shape) and prod(pieces) <= max(prod(shape), 1)
