"""What a file is that is no safetensors file, by its first bytes: each kind by name, with what to do next."""

from pathlib import Path
from typing import NamedTuple

from lora_jax.errors import CheckpointError

_HEAD = 512
"""A tar archive says that it is one at byte 257."""

_HEADER = 100_000_000
"""No header of a safetensors file is longer."""

_AGAIN = "Download or copy the file itself again."
_UNPACK = "Unpack it, and give the file or folder inside that holds the adapter."
_PICKLE = (
    "a pickle can run any code when it is opened, so it is not read. Convert it once, with PyTorch installed: python "
    '-c "import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in torch.load({path!r}, '
    "weights_only=True).items()}}, {out!r}, {{'format': 'pt'}})\""
)


class Kind(NamedTuple):
    """A kind of file that is not read: what it is, and what to do next."""

    name: str
    advice: str


LFS = Kind(
    "a Git LFS pointer, three lines that stand for the file", "Fetch the file: run git lfs pull where it was cloned."
)
GGUF = Kind(
    "a GGUF file, llama.cpp's format",
    "Its tensors are renamed and may be quantised: give the PEFT adapter that it was made from.",
)
GGLA = Kind("an adapter in llama.cpp's first format (GGLA)", "Give the PEFT adapter that it was made from.")
HTML = Kind("an HTML page", "The server sent a page (an error, or one to log in) and not the file: download it again.")
TEXT = Kind("a text file", f"No tensors are stored as text. {_AGAIN}")
NPZ = Kind(
    "an npz archive of NumPy arrays",
    "Save its arrays with safetensors.numpy.save_file, under the same names, and give that file.",
)
NEMO = Kind("a NeMo archive", "Export the adapter from NeMo in Hugging Face's format, and give that folder.")
TORCH = Kind("a PyTorch file (a zip archive with a pickle)", _PICKLE)
PICKLE = Kind("a pickle, such as PyTorch's older files", _PICKLE)
EMPTY = Kind("an empty file", f"It was never written, or its copy was cut short. {_AGAIN}")

_SIGNATURES: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs.github.com/", LFS),
    (b"GGUF", GGUF),
    (b"algg", GGLA),
    (b"\x1f\x8b", Kind("a gzip archive", _UNPACK)),
    (b"BZh", Kind("a bzip2 archive", _UNPACK)),
    (b"\xfd7zXZ\0", Kind("an xz archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("a zstandard archive", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
    (b"\x93NUMPY", Kind("a single NumPy array (npy)", "An adapter has several: give the file that holds all of them.")),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file, as Keras writes weights", "Load it in Keras, and save LoRA's factors.")),
)  # fmt: skip
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


def kind_of(path: Path) -> Kind | None:
    """The kind of a regular file by its first bytes; None where it may be a safetensors file.

    Raises:
      OSError: it cannot be read.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp(), "adapter_model.safetensors")
      >>> file.write_bytes(b"GGUF" + bytes(60)) and kind_of(file).name
      "a GGUF file, llama.cpp's format"
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return EMPTY
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _HEADER:
        # A header of 35,615 bytes begins as gzip does.
        return None
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            return kind
    if head[257:262] == b"ustar":
        return NEMO if path.suffix == ".nemo" else Kind("a tar archive", _UNPACK)
    if head.startswith(b"PK\x03\x04"):
        return _zipped(head)
    return PICKLE if head.startswith(_PICKLES) else _text(head)


def check_text(path: Path) -> None:
    """Refuse a file that should hold JSON where its first bytes show something else.

    Raises:
      CheckpointError: it is of a known kind; the message says what to do next.
    """
    kind = kind_of(path) if path.is_file() else None
    if kind is not None and kind in (LFS, HTML):
        raise CheckpointError(f"{path} is {kind.name}, and no JSON. {kind.advice}")


def check_bytes(path: Path, holds: str = "an adapter") -> None:
    """Refuse a file that its first bytes show to be no safetensors file, of an adapter or what else it should hold.

    Raises:
      CheckpointError: it is of a known kind; the message says what to do next.
    """
    kind = kind_of(path) if path.is_file() else None
    if kind is None:
        return
    # Never over the file itself, should it have that name.
    out = str(path.with_name(f"{path.stem}{'-new' if path.suffix == '.safetensors' else ''}.safetensors"))
    advice = kind.advice.format(path=str(path), out=out) if kind.advice is _PICKLE else kind.advice
    raise CheckpointError(f"{path} is {kind.name}, and no safetensors file with {holds}. {_capital(advice)}")


def _zipped(head: bytes) -> Kind:
    """A zip archive, by the name of the first file in it."""
    length = int.from_bytes(head[26:28], "little")
    name = head[30 : 30 + length]
    if name.endswith(b"data.pkl"):
        return TORCH
    return NPZ if name.endswith(b".npy") else Kind("a zip archive", _UNPACK)


def _text(head: bytes) -> Kind | None:
    plain = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if plain.lower().startswith(_PAGES):
        return HTML
    return TEXT if all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head[:8]) else None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
