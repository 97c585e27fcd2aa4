"""Files as lines: the JSON object in each, or what is wrong with it; and plain texts in pieces."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.data.errors import BadLine, DataError
from lora_jax.regular import unreadable

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NO_TEXT = {
    b"\xff\xfe": "UTF-16, not UTF-8: save it as UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8: save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "a Parquet file: write its rows as JSON lines first",
}
_TABLES = {".csv": "excel", ".tsv": "excel-tab"}
_LONGEST, _SHORTEST, _PIECES = 16_384, 256, 100
_LINE = 1_000_000


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """The number of each line that is not blank, from 1, and the object in it or what is wrong with it.

    Lines end with a line feed, and with a carriage return before it or not. A byte order mark is passed over.

    Raises:
      DataError: the file cannot be read, or is none of lines.
    """
    check_readable(path)
    first = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_BYTE_ORDER_MARK).strip() if number == 1 else line.strip()
            if not text:
                continue
            if first and text[:1] == b"[":
                raise DataError(
                    f"{path}:{number}: the file is a JSON array, where each line is to hold one object. "
                    f"Convert it, for example by: jq -c '.[]' {path.name} > {path.stem}.jsonl"
                )
            first = False
            yield number, _object(text)


def _object(line: bytes) -> dict[str, Any] | BadLine:
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadLine("not UTF-8", f"byte {line[error.start]:#04x} at position {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return BadLine("not JSON", str(error))
    if not isinstance(found, dict):
        return BadLine("not an object", f"it is a {type(found).__name__}")
    if b"\\ud" in line.lower() and not _encodes(found):
        return BadLine("half a character", "an escape like \\ud83d stands without its other half")
    return found


def _encodes(found: dict[str, Any]) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def pieces(path: Path) -> Iterator[tuple[int, str]]:
    """A plain text in pieces that end with lines, or else with words; and the number of the line each begins in.

    Raises:
      DataError: the file cannot be read, is not UTF-8, or holds a table or JSON lines.
    """
    check_readable(path)
    _check_plain(path)
    raw = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        text = raw.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: byte {raw[error.start]:#04x}. Save the file as UTF-8") from error
    most = min(_LONGEST, max(_SHORTEST, len(text) // _PIECES))
    line = begin = 0
    while begin < len(text):
        end = _end(text, begin, most)
        if text[begin:end].strip():
            yield line + 1, text[begin:end]
        line += text.count("\n", begin, end)
        begin = end


def _check_plain(path: Path) -> None:
    """Refuse what would be trained on as it is written, and is meant to be read: tables and JSON lines."""
    if dialect := _TABLES.get(path.suffix.lower()):
        rows = f"csv.DictReader(sys.stdin, dialect='{dialect}')"
        program = f"import csv, json, sys; [print(json.dumps(row)) for row in {rows}]"
        raise DataError(
            f"{path} is a table by its name, and no plain text. Write its rows as JSON lines: "
            f'python -c "{program}" < {path.name} > {path.stem}.jsonl'
        )
    with path.open("rb") as file:
        first = file.readline(_LINE).removeprefix(_BYTE_ORDER_MARK).strip()
    if first[:1] == b"{" and isinstance(_object(first), dict):
        raise DataError(f"{path} begins with a JSON object: name it {path.stem}.jsonl if each of its lines holds one")


def _end(text: str, begin: int, most: int) -> int:
    """Where a piece that begins there ends."""
    if len(text) - begin <= most:
        return len(text)
    for mark in ("\n", " "):
        found = text.rfind(mark, begin, begin + most)
        if found > begin:
            return found + 1
    return begin + most


def check_readable(path: Path) -> None:
    """Refuse what is no file of text.

    Raises:
      DataError: says what it is.
    """
    kind = unreadable(path)
    if kind is not None:
        raise DataError(f"{path} is {kind}. Give a file of JSON lines, a plain text, or a directory with train.jsonl")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for begin, what in _NO_TEXT.items():
        if head.startswith(begin):
            raise DataError(f"{path} is {what}")
