"""`read`: examples from a file of JSON lines, a directory of such, or a plain text, with some of them held out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np

from lora_jax.data.counts import ReadCounts
from lora_jax.data.errors import BadLine, DataError
from lora_jax.data.lines import json_lines, pieces
from lora_jax.data.records import BESIDE, KEYS, Kind, Record, Records, check_keys, detect, record

_JSON = {".jsonl", ".json", ".ndjson"}
_PARTS = ("train", "valid", "test")
_MISNAMED = ("val", "validation", "dev", "eval", "evaluation", "training")


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, and others to evaluate on.

    Attributes:
      train: to train on.
      valid: to evaluate on while training; None if nothing was held out.
      test: from `test.jsonl`; None if there is none.
      sha256: of each file that was read, by its name.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "a.txt")
      >>> _ = path.write_text("a text")
      >>> sorted(read(path, held_out=0).sha256)
      ['a.txt']
    """

    train: Records
    valid: Records | None
    test: Records | None
    sha256: Mapping[str, str]


def read(
    path: str | PathLike[str],
    *,
    kind: Kind | None = None,
    keys: Mapping[str, str] | None = None,
    strict: bool = False,
    held_out: float = 0.05,
    seed: int = 0,
) -> Dataset:
    """Read examples.

    A file named `.jsonl` (or `.json`, `.ndjson`) has an object in each line, a directory has them in `train.jsonl`,
    `valid.jsonl` and `test.jsonl`; any other file is a plain text. What the lines are is told by their keys: `text`;
    `prompt` and `completion`; `messages`; `input` and `label`; `prompt`, `chosen` and `rejected`. `tools` may stand
    beside conversations.

    Args:
      path: the file or directory.
      kind: of the lines, where their keys leave it open: `text`, `completion`, `messages`, `label` or `preference`.
      keys: what the file calls its keys, as `{"prompt": "question"}`.
      strict: raise at the first bad line, instead of counting it.
      held_out: for evaluation, where there is no `valid.jsonl`: a share below 1, or a number of examples; 0 for none.
        Of a plain text it is the end.
      seed: which examples are held out.

    Raises:
      DataError: there is no such file, or no example in it; a line is bad, and `strict` is set.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp(), "sums.jsonl")
      >>> _ = path.write_text('{"prompt": "1+1=", "completion": "2"}\\n' * 40 + "oops\\n")
      >>> data = read(path)
      >>> len(data.train), len(data.valid), data.train.kind, dict(data.train.counts.bad)
      (38, 2, 'completion', {'not JSON': 1})
    """
    source = Path(path).expanduser()
    check_keys(keys or {}, kind)
    files = _files(source)
    found = {part: read_file(file, kind=kind, keys=keys, strict=strict) for part, file in files.items()}
    train, valid, test = (found.get(part) for part in _PARTS)
    assert train is not None  # `_files` finds it or raises
    for other in (valid, test):
        if other is not None and other.kind != train.kind:
            raise DataError(
                f"{other.file} holds {other.kind!r}, but {train.file} {train.kind!r}: they must be of one kind"
            )
    if valid is None and held_out:
        train, valid = hold_out(train, held_out, seed)
    return Dataset(train, valid, test, {file.name: checksum(file) for file in files.values()})


def _files(source: Path) -> dict[str, Path]:
    """The files of a directory by what they are for; a file alone is to train on."""
    if not source.is_dir():
        return {"train": source}
    files = {part: source / f"{part}.jsonl" for part in _PARTS if (source / f"{part}.jsonl").exists()}
    names = sorted(path.name for path in source.iterdir())
    misnamed = [f"{stem}.jsonl" for stem in _MISNAMED if f"{stem}.jsonl" in names]
    if "train" not in files or ("valid" not in files and misnamed):
        raise DataError(
            f"{source} has {', '.join(names[:8]) or 'no file'}, where train.jsonl is needed, and valid.jsonl and "
            "test.jsonl are read if they are there: rename the files, or give one of them"
        )
    return files


def read_file(
    path: str | PathLike[str],
    *,
    kind: Kind | None = None,
    keys: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Records:
    """Read the examples of one file; `read` says how.

    Raises:
      DataError: there is no such file, or no example in it; a line is bad, and `strict` is set.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
      >>> _ = path.write_text('{"input": "good", "label": 1}')
      >>> read_file(path).kind
      'label'
    """
    file = Path(path).expanduser()
    names = dict(keys or {})
    check_keys(names, kind)
    if file.suffix.lower() not in _JSON:
        return _read_plain(file, kind)
    counts, records, seen = ReadCounts(str(path)), [], set()
    for number, line in json_lines(file):
        counts.read += 1
        try:
            if isinstance(line, BadLine):
                raise line
            kind = kind or detect(line, names)
            records.append(record(line, kind, names, number))
            seen.update(line)
        except BadLine as error:
            counts.refuse(number, error, strict)
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
    if not records or kind is None:
        first = f". First of all: {counts.notes[0]}" if counts.notes else ""
        raise DataError(f"{file} holds no example in {counts.read:,} lines{first}")
    counts.kept, counts.kind = len(records), kind
    counts.passed_over = tuple(sorted(seen - {names.get(key, key) for key in (*KEYS[kind], *BESIDE[kind])}))
    return Records(str(path), kind, tuple(records), counts)


def _read_plain(file: Path, kind: Kind | None) -> Records:
    if kind not in (None, "text"):
        raise DataError(
            f"{file} is a plain text by its name, which has no {kind!r}: name it .jsonl if it holds JSON lines"
        )
    records = tuple(Record({"text": text}, line) for line, text in pieces(file))
    if not records:
        raise DataError(f"{file} is empty")
    counts = ReadCounts(str(file), "text", len(records), len(records))
    return Records(str(file), "text", records, counts, plain=True)


def hold_out(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Part examples in two: which are held out depends on their number, on `share` and on `seed` alone.

    Args:
      records: at least two.
      share: below 1, or a number of examples.
      seed: of the choice; the end of a plain text is held out whatever it is.

    Raises:
      DataError: nothing would be left, or nothing can be held out.
    """
    total = len(records)
    count = max(1, round(total * share)) if share < 1 else round(share)
    if share < 0 or count >= total:
        raise DataError(
            f"{records.file} holds {total} example{'s' * (total != 1)}, of which {share} cannot be held out for "
            "evaluation. Hold out fewer or none (held_out=0, --held-out 0), or give a directory with train.jsonl and "
            "valid.jsonl"
        )
    chosen = np.zeros(total, bool)
    chosen[total - count :] = True
    if not records.plain:
        chosen = np.random.default_rng((seed, total)).permutation(chosen)
    parts = (tuple(each for each, out in zip(records, chosen, strict=True) if out == held) for held in (False, True))
    train, valid = (replace(records, records=part) for part in parts)
    return train, valid


def checksum(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, for the record of a run."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
