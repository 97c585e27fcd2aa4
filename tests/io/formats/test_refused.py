"""Files that are no adapter to read: every face says what they are, and what to do next."""

import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save, save_file

import lora_jax as lora
from lora_jax.io.formats.signatures import kind_of
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import merge_checkpoint, read_peft

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
ONES = np.ones((2, 3), np.float32)


def archive(suffix: str, **files: bytes) -> bytes:
    data = io.BytesIO()
    if suffix == "tar":
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    else:
        with zipfile.ZipFile(data, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
    return data.getvalue()


def npz() -> bytes:
    data = io.BytesIO()
    arrays: dict[str, Any] = {"layers.0.q.lora_a": ONES}
    np.savez(data, **arrays)
    return data.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 33588528\n"
BYTES: dict[str, tuple[bytes, str]] = {
    "lfs": (POINTER, "Git LFS pointer.*git lfs pull"),
    "lfs with CRLF": (POINTER.replace(b"\n", b"\r\n"), "Git LFS pointer.*git lfs pull"),
    "gguf": (b"GGUF" + (3).to_bytes(4, "little") + bytes(56), "GGUF.*PEFT adapter that it was made from"),
    "ggla": (b"algg" + (1).to_bytes(4, "little") + bytes(56), "llama.cpp's first format"),
    "npz": (npz(), "npz archive.*save_file"),
    "torch": (archive("zip", **{"archive/data.pkl": b"x", "archive/data/0": b"y"}), "PyTorch file.*Convert it once"),
    "older torch": (pickle.dumps({"a": 1}, protocol=2), "a pickle.*Convert it once.*weights_only=True"),
    "pickle": (pickle.dumps({"a": 1}, protocol=4), "a pickle.*can run any code"),
    "html": (b"\n <!DOCTYPE html><html><body>404</body></html>", "HTML page.*download it again"),
    "html with a mark": (b"\xef\xbb\xbf<html lang=en>", "HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "page.*download it again"),
    "json": (b'{"error": "Repository not found"}', "a text file"),
    "text": (b"Entry not found", "a text file"),
    "empty": (b"", "an empty file.*again"),
    "zip": (archive("zip", **{"adapter_model.safetensors": b"x"}), "a zip archive.*Unpack it"),
    "tar": (archive("tar", **{"adapter_model.safetensors": b"x"}), "a tar archive.*Unpack it"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive.*Unpack it"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(60), "a single NumPy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5.*Keras"),
}  # fmt: skip


def faces(path: Path) -> dict[str, Callable[[], Any]]:
    """What reads an adapter, each on this path."""
    site = lora.find_sites(lambda p, x: x @ p["q"]["kernel"], PARAMS, jnp.ones((1, 3)))
    base = path.parent / "base"
    base.mkdir(exist_ok=True)
    save_file({"q.weight": np.ones((4, 3), np.float32)}, base / "model.safetensors")
    return {
        "load": lambda: lora.peft.load(path, PARAMS, site),
        "read_peft": lambda: read_peft(path),
        "inspect": lambda: inspect(path),
        "merge": lambda: merge_checkpoint(base, path, base.parent / "out"),
        "own": lambda: lora.load(path),
    }


PARAMS = {"q": {"kernel": np.ones((3, 4), np.float32)}}


def refused(path: Path, message: str) -> None:
    for name, face in faces(path).items():
        with pytest.raises(lora.CheckpointError) as raised:
            face()
        assert re.search(message, str(raised.value)), name


@pytest.mark.parametrize(("data", "message"), BYTES.values(), ids=BYTES)
def test_files_are_named_by_their_bytes(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    refused(path, f"(?s){path.name} is .*{message}")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    path.rename(folder / path.name)
    with pytest.raises(lora.CheckpointError, match=f"(?s){path.name} is .*{message}"):
        read_peft(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adapter_model.bin", "torch"), ("adapter_0.pt", "older torch"), ("adapters.npz", "npz"), ("adapter.gguf", "gguf"),
     ("pytorch_lora_weights.bin", "torch"), ("lora.ckpt", "pickle")],
)  # fmt: skip
def test_folders_are_named_by_their_files(name: str, kind: str, tmp_path: Path) -> None:
    data, message = BYTES[kind]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / name).write_bytes(data)
    for face in (read_peft, inspect):
        with pytest.raises(lora.CheckpointError, match=f"(?s){name} is .*{message}"):
            face(folder)


def test_a_nemo_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_bytes(archive("tar", **{"model_weights.ckpt": b"x"}))
    refused(path, "NeMo archive.*Hugging Face's format")


@pytest.mark.parametrize("length", [0x8B1F, 0x9380, 0x0280, 0x0480, 0x685A42, 0x4B50])
def test_headers_whose_length_looks_like_a_signature(length: int, tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"note": ""}})
    text = header.replace('""', json.dumps("x" * (length - len(header)))).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text)
    assert kind_of(path) is None


def keyed(*keys: str, prefix: str = "layers.0.q.") -> dict[str, np.ndarray]:
    return {prefix + key: ONES for key in keys}


KEYS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "loha": (keyed("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), "LoHa"),
    "loha of kohya": (keyed("hada_w1_a", prefix="lora_unet_mid_block."), "LoHa"),
    "lokr": (keyed("lokr_w1", "lokr_w2_a", "lokr_w2_b"), "LoKr"),
    "oft": (keyed("oft_blocks", "alpha"), "OFT"),
    "oft of peft": (keyed("oft_R.weight"), "OFT"),
    "boft": (keyed("boft_R", "boft_s"), "OFT"),
    "ia3": (keyed("ia3_l"), "IA"),
    "glora": (keyed("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLora"),
    "tucker": (keyed("lora_down.weight", "lora_up.weight", "lora_mid.weight"), "Tucker core"),
    "dora of lycoris": (keyed("lora_down.weight", "lora_up.weight", "dora_scale"), "DoRA as LyCORIS"),
    "differences": (keyed("diff", "diff_b"), "whole differences"),
    "torchtune": (keyed("lora_a.weight", "lora_b.weight"), "torchtune.*adapter_model.safetensors"),
    "nemo": (keyed("adapter_layer.lora_kqv_adapter.linear_in.weight"), "NeMo"),
    "xlabs": (keyed("processor.qkv_lora1.down.weight"), "XLabs"),
    "vblora": (keyed("vblora_logits"), "another method of PEFT"),
    "prompts": ({"prompt_embeddings": ONES}, "prompts"),
    "model": (keyed("weight", "bias"), "it is a model.*extract"),
    "one table": ({"model.embed_tokens.weight": ONES}, "it is a model"),
}


@pytest.mark.parametrize(("tensors", "message"), KEYS.values(), ids=KEYS)
def test_other_methods_are_named_by_their_keys(tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    for name, face in faces(path).items():
        with pytest.raises(lora.CheckpointError, match="lora_jax.peft.load" if name == "own" else message):
            face()


def test_whole_tensors_need_a_config_that_asks_for_them(tmp_path: Path) -> None:
    factors = {"q.lora_A.weight": ONES, "q.lora_B.weight": np.ones((4, 2), np.float32)}
    path = tmp_path / "adapter_model.safetensors"
    save_file(factors | {"score.extra.weight": ONES}, path)
    with pytest.raises(lora.CheckpointError, match=r"1 tensors are neither factors.*score.extra.weight"):
        read_peft(path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, "modules_to_save": ["score"]}))
    assert list(read_peft(path).saved) == ["score.extra.weight"]
    (tmp_path / "adapter_config.json").unlink()
    save_file(factors | {"score.modules_to_save.default.weight": ONES}, path)
    assert read_peft(path).config["modules_to_save"] == ["score"]


def test_a_module_may_be_called_as_a_tensor_of_another_method(tmp_path: Path) -> None:
    tensors = {"linear_in.lora_A.weight": ONES, "linear_in.lora_B.weight": ONES.T, "head.linear_out.weight": ONES}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {**CONFIG, "target_modules": ["linear_in"], "modules_to_save": ["head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert list(read_peft(tmp_path).saved) == ["head.linear_out.weight"]


def test_formats_given_to_the_other_reader(tmp_path: Path) -> None:
    sites = lora.find_sites(lambda p, x: x @ p["q"]["kernel"], PARAMS, jnp.ones((1, 3)))
    adapter = lora.init(jax.random.key(0), lora.LoraConfig(rank=2, targets="q"), PARAMS, sites)
    lora.save(tmp_path / "own", adapter)
    lora.peft.save(tmp_path / "peft", adapter)
    with pytest.raises(lora.CheckpointError, match=r"own is an Orbax checkpoint.*lora_jax.load reads it"):
        lora.peft.load(tmp_path / "own", PARAMS, sites)
    with pytest.raises(lora.CheckpointError, match=r"peft holds adapter_model.safetensors.*lora_jax.peft.load"):
        lora.load(tmp_path / "peft")


def test_orbax_checkpoints_of_others(tmp_path: Path) -> None:
    ocp.save(str(tmp_path / "qwix"), {"q": {"kernel_lora_a": jnp.ones((3, 2)), "kernel_lora_b": jnp.ones((2, 4))}})
    for face in (lora.load, inspect):
        with pytest.raises(lora.CheckpointError, match=r"not written by lora_jax.save.*qwix's"):
            face(tmp_path / "qwix")


@pytest.mark.parametrize("names", [("x.safetensors",), ("model-00001-of-00002.safetensors", "model.safetensors")])
def test_folders_without_a_name_that_says_adapter(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(save({"q.lora_A.weight": ONES}))
    with pytest.raises(
        lora.CheckpointError, match=f"but {', '.join(names)}: if one of them is an adapter, give its file"
    ):
        read_peft(tmp_path)


@pytest.mark.parametrize(("kind", "message"), [("lfs", "Git LFS pointer.*git lfs pull"), ("html", "HTML page")])
def test_configs_and_bases_that_are_not_there_yet(kind: str, message: str, tmp_path: Path) -> None:
    data = BYTES[kind][0]
    factors = {"q.lora_A.weight": ONES, "q.lora_B.weight": np.ones((4, 2), np.float32)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(lora.CheckpointError, match=f"(?s)adapter_config.json is .*{message}"):
        read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(data)
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(lora.CheckpointError, match=r"model.safetensors is a.*no safetensors file with a model"):
        merge_checkpoint(tmp_path / "base", tmp_path, tmp_path / "out")
