"""Small adapters of each format, damaged at random: each is read, or refused by an error of ours, and soon."""

import contextlib
import json
import random
import resource
import shutil
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_adapter
from peft_models import nested

import lora_jax as lora
from lora_jax.adapter.site import Site, Sites
from lora_jax.io.inspect import inspect, read_factors

SECONDS, BYTES = 5, 500 << 20
TABLE = Site(path="wte/embedding", shape=(5, 3), dtype="float32", kind="embedding", in_axes=(0,), out_axes=(1,))
QUERY = Site(path="layers_0/q/kernel", shape=(3, 2), dtype="float32", kind="dense", in_axes=(0,), out_axes=(1,))
SITES = Sites([TABLE, QUERY])
PARAMS = nested({site.path: np.zeros(site.shape, np.float32) for site in SITES.values()})
CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "_CHECKPOINT_METADATA"
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1 << 31,
    1 << 63,
    10**400,
    0.5,
    -0.0,
    1e39,
    float("nan"),
    float("inf"),
    "",
    "q",
    "8",
    "(a+)+",
    "../..",
    "/dev/zero",
    "\0",
    "\33[2J",
    "é",
    [],
    [[]],
    [None],
    ["q"],
    [0],
    [1 << 40],
    [1 << 40] * 8,
    {},
    {"q": 2},
    {"": None},
    "float32[2,16]",
    "float32[99999999999]",
    "F64",
    "BOOL",
    "x" * 5000,
    [0] * 1000,
]
FIELDS = [
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "peft_type",
    "init_lora_weights",
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "layers_to_transform",
    "layer_replication",
    "init_r",
    "note",
    "loftq_config",
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every entry of a JSON tree, as its container and key."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [(tree, key) for key, _ in pairs]
    return found + [place for _, value in list(pairs) for place in places(value)]


def disturbed(draw: random.Random, tree: Any, fields: list[str]) -> Any:
    """A JSON tree in which a few entries are others, gone, added, or have changed places."""
    for _ in range(draw.randrange(1, 4)):
        found = places(tree)
        if not found:
            return draw.choice(VALUES)
        where, key = draw.choice(found)
        kind = draw.randrange(5)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where, dict):
            where[draw.choice(fields)] = draw.choice(VALUES)
        elif kind == 2:
            other, place = draw.choice(found)
            where[key], other[place] = other.get(place) if isinstance(other, dict) else draw.choice(VALUES), where[key]
        elif kind == 3 and isinstance(where[key], int):
            where[key] += draw.choice([-1, 1, 8, 1 << 20])
        else:
            where[key] = draw.choice(VALUES)
    return tree


def dumped(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # a tree that is inside of itself
        return b"[" * 2000


def bits(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def grown(draw: random.Random, data: bytes) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.randbytes(draw.choice([1, 8, 300])) + data[place:]


def header(draw: random.Random, data: bytes) -> bytes:
    """Other dtypes, shapes, offsets, names in the header of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    text = dumped(
        disturbed(draw, json.loads(data[8 : 8 + length]), ["dtype", "shape", "data_offsets", "__metadata__", "q"])
    )
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def fields(draw: random.Random, data: bytes) -> bytes:
    return dumped(disturbed(draw, json.loads(data), FIELDS))


def values(draw: random.Random, data: bytes) -> bytes:
    """NaN, infinity or the largest number among the values at the end."""
    place = len(data) - 4 * draw.randrange(1, 9)
    return data[:place] + struct.pack("<f", draw.choice([float("nan"), float("inf"), 3e38])) + data[place + 4 :]


PLAIN: list[Callable[[random.Random, bytes], bytes]] = [bits, cut, grown]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    adapter = random_adapter(SITES)
    lora.peft.save(folder / "peft", adapter, sites=SITES)
    lora.save(folder / "own", adapter, params=PARAMS)
    return {name: folder / name for name in ("peft", "own")}


def damage(draw: random.Random, folder: Path) -> str:
    """Change one file of an adapter; what was done to which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    likely = [path for path in files if path.name in (CONFIG, WEIGHTS, NOTES)]
    path = draw.choice(likely if draw.random() < 0.7 else files)
    if draw.random() < 0.03:
        path.unlink()
        return f"{path.name} gone"
    special = {WEIGHTS: [header, header, values], CONFIG: [fields] * 4, NOTES: [fields] * 4}.get(path.name, [])
    change = draw.choice(PLAIN + special)
    path.write_bytes(change(draw, path.read_bytes()))
    return f"{path.name} {change.__name__}"


def read(kind: str, folder: Path) -> None:
    """All the ways to read an adapter; the first that refuses ends it."""
    adapter = lora.peft.load(folder, PARAMS, SITES) if kind == "peft" else lora.load(folder, PARAMS)
    assert all(update.site.shape == SITES[path].shape for path, update in adapter.items())
    lora.merge(PARAMS, adapter)


def outcome(kind: str, folder: Path) -> str:
    """`read`, or the kind of what refused it; anything that is no error of ours is raised on."""
    for look in (lambda: str(inspect(folder)), lambda: read_factors(folder)):
        with contextlib.suppress(lora.LoraError):
            look()
    try:
        read(kind, folder)
    except lora.LoraError as error:
        return f"refused: {type(error).__name__}"
    return "read"


@pytest.mark.parametrize("kind", ["peft", "own"])
def test_damaged_adapters(kind: str, good: dict[str, Path], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    counts: Counter[str] = Counter()
    rounds = {"peft": 400, "own": 60}[kind] * (20 if pytestconfig.getoption("full") else 1)
    for number in range(rounds):
        folder = tmp_path / "a"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good[kind], folder)
        what = damage(random.Random(number), folder)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = outcome(kind, folder)
        except Exception as error:
            raise AssertionError(f"{kind} adapter, seed {number}, {what}: {type(error).__name__}: {error}") from error
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert time.monotonic() - started < SECONDS, f"{kind} adapter, seed {number}, {what}: too long"
        assert taken << 10 < BYTES, f"{kind} adapter, seed {number}, {what}: {taken >> 10} MB"
        counts[f"{what}: {found}"] += 1
    print(
        f"\n{rounds} damaged adapters, {kind}:",
        *(f"{count:5d}  {what}" for what, count in sorted(counts.items())),
        sep="\n",
    )
    assert any(what.endswith("read") for what in counts) and any("refused" in what for what in counts)
