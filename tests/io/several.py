"""One of several processes of a program that saves adapters; `python several.py PORT COUNT INDEX FOLDER [DIES]`.

The adapter and the base are spread over the processes. A line of JSON says what became of each attempt. With DIES, that
process is killed in the middle of overwriting `own`: `before` it has sent its part, or while it `publishes`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers import assert_same
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import publish
from lora_jax.processes import gathered

PORT, COUNT, INDEX, FOLDER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(f"localhost:{PORT}", COUNT, INDEX, heartbeat_timeout_seconds=10)

MESH = jax.make_mesh((COUNT,), ("x",), axis_types=(AxisType.Auto,))
KERNEL = np.arange(32, dtype=np.float32).reshape(8, 4)


def model(params: Any, x: Any) -> Any:
    return x @ params["q"]["kernel"]


SITES = lora.find_sites(model, {"q": {"kernel": KERNEL}}, np.ones((2, 8), np.float32))


def spread(tree: Any) -> Any:
    """The tree with every array over all processes, by its last axis where that can be divided."""

    def each(leaf: Any) -> jax.Array:
        value = np.asarray(leaf)
        divided = value.ndim and value.shape[-1] % COUNT == 0
        spec = PartitionSpec(*[None] * (value.ndim - 1), "x") if divided else PartitionSpec()
        return jax.make_array_from_callback(value.shape, NamedSharding(MESH, spec), lambda index: value[index])

    return jax.tree.map(each, tree)


def adapter(size: float) -> lora.Adapter:
    site = SITES["q/kernel"]
    a, b = size * np.arange(16, dtype=np.float32).reshape(2, 8), np.full((2, 4), size, np.float32)
    return lora.Adapter({site.path: lora.LowRank(spread(a), spread(b), spread(np.float32(size)), site)})


def attempt(save: Callable[[], None]) -> str:
    try:
        save()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def whole(found: lora.Adapter) -> dict[str, list[np.ndarray]]:
    return {path: [np.asarray(gathered(leaf)) for leaf in jax.tree.leaves(update)] for path, update in found.items()}


old, new, params = adapter(1), adapter(2), spread({"q": {"kernel": KERNEL}})
own, peft, held = FOLDER / "own", FOLDER / "peft", FOLDER / "file" / "own"
lora.save(own, old, params=params)
lora.peft.save(peft, old, sites=SITES, params=params)
if len(sys.argv) > 5:
    if (sys.argv[5], INDEX) == ("before", COUNT - 1):
        die()
    publish._put = die if sys.argv[5] == "publishes" else publish._put  # pyright: ignore[reportPrivateUsage]
said = {
    "own again": attempt(lambda: lora.save(own, new, params=params)),
    "own over": attempt(lambda: lora.save(own, new, params=params, overwrite=True)),
    "peft again": attempt(lambda: lora.peft.save(peft, new, sites=SITES, params=params)),
    "peft over": attempt(lambda: lora.peft.save(peft, new, sites=SITES, params=params, overwrite=True)),
    "own held": attempt(lambda: lora.save(held, new)),
    "peft held": attempt(lambda: lora.peft.save(held, new, sites=SITES)),
}
back = lora.load(own, params, sharding=NamedSharding(MESH, PartitionSpec()))
assert_same(whole(back), whole(new))
assert_same(whole(lora.peft.load(peft, params, SITES)), whole(new))
print(json.dumps(said), flush=True)
