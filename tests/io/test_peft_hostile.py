"""Files that are damaged, or made to do harm: a `CheckpointError` names file and key, and nothing is written."""

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_models import nested
from safetensors.numpy import load_file, save, save_file

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites
from lora_jax.io.inspect import inspect
from lora_jax.io.peft import config as peft_config
from lora_jax.io.peft import read_peft
from lora_jax.io.peft import write as peft_write

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.layers.0.q.lora_A.weight"
TABLE = Site(path="wte/embedding", shape=(5, 3), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,))
QUERY = Site(path="layers_0/q/kernel", shape=(3, 2), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
SITES = Sites([TABLE, QUERY])
PARAMS = nested({site.path: np.zeros(site.shape, np.float32) for site in SITES.values()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lora.peft.save(tmp_path / "a", random_adapter(SITES), sites=SITES)
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | {"rank_pattern": {"layers.0.q": 2}}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    return tmp_path / "a"


def load(folder: Path, **options: Any) -> lora.Adapter:
    return lora.peft.load(folder, PARAMS, SITES, **options)


def refused(folder: Path, message: str, **options: Any) -> None:
    """Loading raises the error, and leaves every file as it is."""
    before = {path: path.lstat().st_mtime_ns for path in folder.parent.rglob("*")}
    with pytest.raises(lora.CheckpointError, match=message):
        load(folder, **options)
    assert {path: path.lstat().st_mtime_ns for path in folder.parent.rglob("*")} == before


# The arrays.


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, stop: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut in the length": lambda good: good[:5],
    "cut in the header": lambda good: good[:40],
    "cut in the data": lambda good: good[:-1],
    "longer than it says": lambda good: good + b"\0",
    "header beyond the end": lambda good: raw({}, length=1 << 20),
    "header of a terabyte": lambda good: raw({}, length=1 << 40),
    "header of all of 64 bits": lambda good: raw({}, length=(1 << 64) - 1),
    "header that is no JSON": lambda good: raw(b"{"),
    "header that is a list": lambda good: raw([]),
    "header that is no text": lambda good: raw(b"\xff\xfe\xfd"),
    "overlapping tensors": lambda good: raw({"a": tensor(0, 4), "b": tensor(2, 6)}, b"\0" * 6),
    "tensors with a gap": lambda good: raw({"a": tensor(0, 4), "b": tensor(8, 12)}, b"\0" * 12),
    "tensor beyond the end": lambda good: raw({"a": tensor(0, 400, (100,))}, b"\0" * 4),
    "tensor backwards": lambda good: raw({"a": tensor(4, 0)}, b"\0" * 4),
    "tensor of 2**80 bytes": lambda good: raw({"a": tensor(0, 4, (1 << 40, 1 << 40))}, b"\0" * 4),
    "dtype of its own": lambda good: raw({"a": tensor(0, 4, dtype="F33")}, b"\0" * 4),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_files(broken: Callable[[bytes], bytes], folder: Path) -> None:
    (folder / ARRAYS).write_bytes(broken((folder / ARRAYS).read_bytes()))
    refused(folder, rf"{ARRAYS} cannot be read as safetensors: .*copy it again")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 3), np.nan, np.float32), "has 6 values that are NaN or infinite"),
        (np.asarray([[1, 1, -np.inf], [0, 0, 0]], np.float16), "has 1 values that are NaN or infinite"),
        (np.full((2, 3), 1e39), "infinite in float32"),
        (np.ones((2, 3), np.int64), "is I64; adapters are stored as one of BF16, F16, F32, F64"),
        (np.ones((2, 3), ml_dtypes.float8_e4m3fn), "is F8_E4M3; adapters are stored"),
        (np.ones((2, 3), np.bool_), "is BOOL"),
        (np.ones((3, 3), np.float32), "of shape .3, 3. does not fit lora_B of shape .2, 2.: they must share the rank"),
        (np.ones((2, 3, 1), np.float32), "of shape .2, 3, 1. does not fit"),
        (np.ones(2, np.float32), "of shape .2,. does not fit"),
        (np.float32(2), r"of shape \(\) does not fit"),
        (np.ones((2, 4), np.float32), "Shaped differently: layers.0.q has A .2, 4."),
        (np.ones((0, 3), np.float32), "so it holds nothing: the parameters were sharded"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_factors(array: np.ndarray, message: str, folder: Path) -> None:
    save_file(load_file(folder / ARRAYS) | {KEY: np.asarray(array)}, folder / ARRAYS)
    refused(folder, rf"(?s){ARRAYS}.*{message}" if "Shaped" in message else rf"{ARRAYS}: {KEY}.*{message}")
    (folder / CONFIG).unlink()
    refused(folder, f"(?s){ARRAYS}.*{message}", alpha=4)


def test_absurd_ranks(folder: Path) -> None:
    factors = {KEY: np.zeros((70_000, 3), np.float32), KEY.replace("_A", "_B"): np.zeros((2, 70_000), np.float32)}
    save_file(load_file(folder / ARRAYS) | factors, folder / ARRAYS)
    refused(folder, f"{KEY} .* has rank 70000, more than the 65536 that is believable")


def test_parts_that_are_missing_or_twice(folder: Path) -> None:
    arrays = load_file(folder / ARRAYS)
    save_file(arrays | {KEY.replace("base_model.model.", ""): arrays[KEY]}, folder / ARRAYS)
    refused(folder, f"{ARRAYS}: .*lora_A.weight and another key mean the same tensor")
    del arrays[KEY]
    save_file(arrays, folder / ARRAYS)
    refused(folder, f"{ARRAYS}: {KEY} is missing, although the module's other tensors are there")
    save_file({}, folder / ARRAYS)
    refused(folder, "holds no tensors at all")


# The config.


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b'{"r": 2, "r": 3}', b"[" * 100_000, b'{"r": ' + b"9" * 10_000 + b"}", b" " * (1 << 25)],
    ids=["empty", "cut", "no text", "twice", "deep", "long number", "large"],
)
def test_configs_that_are_no_json(text: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text)
    refused(folder, f"{CONFIG} is not readable as JSON")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4, "rank_pattern": {}}, "has rank 2, but adapter_config.json says 4 .* belongs to another adapter"),
        ({"rank_pattern": {"q": 3}}, f"{KEY} of shape .2, 3. has rank 2, but adapter_config.json says 3"),
        ({"r": 0}, "r=0 must be a positive integer"),
        ({"r": -2}, "r=-2 must be"),
        ({"r": 2.0}, "r=2.0 must be"),
        ({"r": True}, "r=True must be"),
        ({"r": "2"}, "r='2' must be"),
        ({"r": 10**300}, r"r=10+\.\.\. must be a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf must be a finite number"),
        ({"lora_alpha": 10**400}, "must be a finite number"),
        ({"lora_alpha": [1]}, r"lora_alpha=\[1\] must be a finite number"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 must be a probability"),
        ({"rank_pattern": ["q"]}, "rank_pattern=.* must be an object"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"alpha_pattern": {"a{99999999999}": 2}}, "is not a regular expression"),
        ({"alpha_pattern": {f"a*{n}": 2 for n in range(257)}}, "has 257 regular expressions, more than the 256"),
        ({"rank_pattern": {f"q.{n}": 2 for n in range(16_385)}}, "has 16,385 keys, more than the 16,384"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\]=None must be a finite number"),
        ({"target_modules": 3}, "target_modules=3 must be a list of names, or one regular expression"),
        ({"target_modules": "["}, r"target_modules: '\[' is not a regular expression"),
        ({"exclude_modules": r"(a)\1"}, "exclude_modules: .* has a back-reference"),
        ({"rank_pattern": {"((q{9}){9}){99}": 2}}, "rank_pattern: .* repeats too much"),
        ({"target_modules": [1]}, "target_modules=.* must be"),
        ({"modules_to_save": "head"}, "modules_to_save='head' must be a list of names"),
        ({"target_parameters": {"a": 1}}, "target_parameters=.* must be a list of names"),
        ({"bias": "some"}, "bias='some' must be one of none, all, lora_only"),
        ({"bias": {}}, "bias={} must be one of"),
        ({"use_rslora": "no"}, "use_rslora='no' must be true or false"),
        ({"fan_in_fan_out": 2}, "fan_in_fan_out=2 must be true or false"),
        ({"peft_type": None}, "peft_type=None cannot be read"),
        ({"init_lora_weights": {}}, "init_lora_weights={} is unknown"),
    ],
)
def test_configs_that_lie(config: dict[str, Any], message: str, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    refused(folder, f"adapter_.*: .*{message}")


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*", "((a*)b?){2,}", "(a{1,9})*", "(?:a|aa)+", "([)a]+)+"])
def test_patterns_that_would_take_for_ever(pattern: str, folder: Path) -> None:
    """On sixty letters, `re` would not come back in a lifetime; here they are read, and say how they match."""
    config = json.loads((folder / CONFIG).read_text())
    arrays = {key.replace("layers.0.q", "a" * 60 + "!"): value for key, value in load_file(folder / ARRAYS).items()}
    save_file(arrays, folder / ARRAYS)
    for change in ({"rank_pattern": {pattern: 2}}, {"alpha_pattern": {pattern: 2}}, {"target_modules": pattern}):
        (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": {}} | change))
        assert len(read_peft(folder).modules) == 2


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q|up_proj).*?)|(?:layers\.[\d]{1,}\.(?:(?:q|k)))",
        r"^(?!.*visual).*(q|wte)$", r"(.*\.)?layers\.(\d+)\.[(+q|]", r"layers\.\(?0\)*\.q",
    ],
)  # fmt: skip
def test_patterns_that_people_use(pattern: str, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": pattern}))
    assert len(load(folder)) == 2


@pytest.mark.parametrize(
    "fields", [{"use_rslora": 0}, {"use_dora": 0, "lora_bias": 0}, {"init_lora_weights": None}, {"weight_decay": ""}]
)
def test_configs_that_mean_no_harm(fields: dict[str, Any], folder: Path) -> None:
    expected, config = load(folder), json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text("\ufeff" + json.dumps(config | fields), encoding="utf-8")
    assert_same(load(folder), expected)


def test_a_note_of_somebody_is_warned_of(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"trained_by\33[2J": "me"}))
    with pytest.warns(UserWarning, match=r"trained_by.x1b.2J': nothing of PEFT's is called so"):
        assert len(load(folder)) == 2
    for field in ("use_newlora", "newlora_config", "beta_scaling", "rank_dropout"):
        (folder / CONFIG).write_text(json.dumps(config | {field: 1}))
        refused(folder, f"{CONFIG}: {field}=1 is nothing this version knows")


def test_many_parameters_of_one_module(tmp_path: Path) -> None:
    """Which factors belong to which of forty parameters could be told in more ways than there are atoms."""
    owners = [f"experts{'.base_layer' * depth}" for depth in range(12)]
    arrays = {f"base_model.model.{each}.lora_A.weight": np.ones((2, 3), np.float32) for each in owners}
    arrays |= {f"base_model.model.{each}.lora_B.weight": np.ones((4, 2), np.float32) for each in owners}
    save_file(arrays, tmp_path / ARRAYS)
    names = [f"experts.w{i}" for i in range(40)]
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_parameters": names}))
    entries = inspect(tmp_path).entries
    assert [(entry.rank, entry.scale) for entry in entries] == [(2, None)] * 12


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")
    refused(folder, f"{CONFIG} holds a list, not the object that belongs there")


# Paths.


@pytest.mark.parametrize("name", ["..", "../a", "/", "/etc", "", "b/../../a", "/proc/self"])
def test_subfolders_that_lead_elsewhere(name: str, folder: Path) -> None:
    refused(folder, "subfolder=.* must name a directory below", subfolder=name)


@pytest.mark.parametrize("name", ["none", "a\0b", "x" * 300, ARRAYS + "/a"])
def test_subfolders_that_are_not_there(name: str, folder: Path) -> None:
    refused(folder, "There is nothing at|cannot be looked into", subfolder=name)


def test_links_of_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, ARRAYS):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "a" / name)
    assert_same(load(tmp_path / "snapshot"), load(folder))


@pytest.mark.parametrize("name", [CONFIG, ARRAYS])
@pytest.mark.parametrize("kind", ["dangling", "loop", "directory", "pipe"])
def test_something_else_where_a_file_belongs(name: str, kind: str, folder: Path) -> None:
    path = folder / name
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "dangling": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(name),
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    refused(folder, rf"{name} is .*regular file|is neither a PEFT adapter .{name}")


# Writing.


def test_an_existing_directory_is_left_alone(folder: Path, tmp_path: Path) -> None:
    before = (folder / ARRAYS).read_bytes()
    other = random_adapter(SITES, seed=1)
    with pytest.raises(lora.CheckpointError, match="exists already"):
        lora.peft.save(folder, other)
    (tmp_path / "notes").mkdir()
    with pytest.raises(lora.CheckpointError, match="is no PEFT adapter, so it is left alone"):
        lora.peft.save(tmp_path / "notes", other, overwrite=True)
    assert (folder / ARRAYS).read_bytes() == before and not list((tmp_path / "notes").iterdir())
    (folder / "README.md").write_text("mine")
    lora.peft.save(folder, other, overwrite=True)
    assert_same(load(folder), other)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, ARRAYS]


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_are_not_written_through(overwrite: bool, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(lora.CheckpointError, match="exists"):
        lora.peft.save(tmp_path / "link", random_adapter(SITES), overwrite=overwrite)
    (tmp_path / "precious").write_bytes((folder / ARRAYS).read_bytes())
    (folder / ARRAYS).unlink()
    (folder / ARRAYS).symlink_to(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    lora.peft.save(folder, random_adapter(SITES, seed=1), overwrite=True)
    assert (tmp_path / "precious").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link", "precious"]


@pytest.mark.parametrize("name", [CONFIG, ARRAYS])
def test_a_directory_where_a_file_is_to_be_written(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    left = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(lora.CheckpointError, match=f"{name} is a directory where a file belongs"):
        lora.peft.save(folder, random_adapter(SITES, seed=1), overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == left


def test_a_write_cut_short_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(arrays: dict[str, np.ndarray], path: Path, **_: Any) -> None:
        Path(path).write_bytes(save(arrays)[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_write, "save_file", full_disk)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with pytest.raises(lora.CheckpointError, match=r"cannot be written: .*No space left on device"):
            lora.peft.save(target, random_adapter(SITES, seed=1), overwrite=True)
    with pytest.raises(lora.CheckpointError, match="cannot be written"):
        lora.peft.save(folder / ARRAYS / "below a file", random_adapter(SITES))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


# Fuzzing: everything either loads, or is refused for a reason.


def loads_or_is_refused(folder: Path) -> bool:
    """Whether it loads; anything but a `CheckpointError`, or a warning of unknown fields, is raised on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*taken for a note")
        try:
            adapter = load(folder)
        except lora.CheckpointError:
            return False
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter))
    return True


FUZZ = settings(max_examples=settings.default.max_examples * 3)
pytestmark = pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "a"
    lora.peft.save(path, random_adapter(SITES), sites=SITES)
    config = json.loads((path / CONFIG).read_text()) | {
        "rank_pattern": {"layers.0.q": 2},
        "target_modules": ["q", "wte"],
    }
    return {ARRAYS: (path / ARRAYS).read_bytes(), CONFIG: json.dumps(config).encode()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@FUZZ
@given(
    name=st.sampled_from([ARRAYS, ARRAYS, CONFIG]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.none(), st.floats(0, 1)),
)
def test_flipped_bytes(
    good: dict[str, bytes], scratch: Path, name: str, places: list[tuple[float, int]], cut: float | None
) -> None:
    changed = bytearray(good[name])
    for place, byte in places:
        changed[int(place * len(changed))] = byte
    del changed[len(changed) if cut is None else int(cut * len(changed)) :]
    for file, content in {**good, name: bytes(changed)}.items():
        (scratch / file).write_bytes(content)
    loads_or_is_refused(scratch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["q", "wte", ".*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = sorted(peft_config._NEUTRAL | peft_config._VARIANTS.keys() | {"unknown"})


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_values_in_the_config(good: dict[str, bytes], scratch: Path, changes: dict[str, Any]) -> None:
    (scratch / ARRAYS).write_bytes(good[ARRAYS])
    (scratch / CONFIG).write_text(json.dumps(json.loads(good[CONFIG]) | changes))
    loads_or_is_refused(scratch)


WORDS = ["base_model.model", "layers.0", "q", "wte", "lora_A", "lora_B", "weight", "bias", "default", "base_layer",
         "lora_embedding_A", "lora_magnitude_vector", "modules_to_save", "_orig_mod", "token_adapter",
         "trainable_tokens_delta", "lora_diag", "original_module", "", "ü\n"]  # fmt: skip
KEYS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(".".join)
SHAPES = st.sampled_from([(2, 3), (2, 2), (5, 3), (2,), (), (2, 3, 1)])


@FUZZ
@given(tensors=st.dictionaries(KEYS, SHAPES, max_size=4), config=st.booleans())
def test_any_keys(good: dict[str, bytes], scratch: Path, tensors: dict[str, tuple[int, ...]], config: bool) -> None:
    (scratch / CONFIG).write_bytes(good[CONFIG])
    if not config:
        (scratch / CONFIG).unlink()
    save_file({key: np.ones(shape, np.float32) for key, shape in tensors.items()}, scratch / ARRAYS)
    loads_or_is_refused(scratch)


def test_the_fuzzed_files_are_good(good: dict[str, bytes], scratch: Path) -> None:
    for file, content in good.items():
        (scratch / file).write_bytes(content)
    assert loads_or_is_refused(scratch) and len(read_peft(scratch).modules) == 2
