"""Compositions are those of PEFT's add_weighted_adapter, wherever that computes what it says."""

from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from helpers import assert_close
from torch import nn

from lora_jax.io.compose import compose_files
from lora_jax.io.peft import PeftFiles, read_peft, write_peft

WEIGHTS = [0.7, -0.4, 1.3]
THINNED = ("ties", "magnitude_prune", "dare_linear", "dare_ties")
DETERMINISTIC = ("cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
RANDOM = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


class Model(nn.Module):
    """A table, a convolution and linear layers; `extra` is adapted by the last adapter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(2, 5, 3)
        self.up, self.extra = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Any) -> Any:
        image = self.embed(x)[:, None].repeat(1, 2, 1, 1)
        return self.extra(torch.tanh(self.up(self.embed(x)))).sum((1, 2)) + self.conv(image).sum((1, 2, 3))


def adapted(
    folder: Path, ranks: tuple[int, ...] = (3, 3, 3), targets: Any = None, **options: Any
) -> tuple[Any, list[PeftFiles]]:
    """A PEFT model with an adapter of every rank, and their files."""
    torch.manual_seed(0)
    targets = targets or [["embed", "conv", "up"], ["embed", "conv", "up"], ["embed", "conv", "up", "extra"]]
    model = None
    for i, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=2 + 3 * i, target_modules=targets[i], **options)
        if model is None:
            model = peft.get_peft_model(Model(), config, adapter_name="a0")
        else:
            model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval(), [read_peft(folder, f"a{i}") for i in range(len(ranks))]


def combine(
    model: Any, method: str, count: int, weights: list[float] = WEIGHTS, **options: Any
) -> dict[str, np.ndarray]:
    """PEFT's composition, as what it adds to each weight."""
    names = [f"a{i}" for i in range(count)]
    model.base_model.add_weighted_adapter(names, weights[:count], "made", combination_type=method, **options)
    return deltas(model, "made")


def deltas(model: Any, name: str) -> dict[str, np.ndarray]:
    """What a PEFT adapter adds to each weight."""
    with torch.no_grad():
        return {
            module.removeprefix("base_model.model."): layer.get_delta_weight(name).numpy()
            for module, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight") and name in layer.scaling
        }


def ours(files: list[PeftFiles], like: dict[str, np.ndarray], method: str, weights: Any = WEIGHTS, **options: Any) -> dict[str, np.ndarray]:  # fmt: skip
    made, _ = compose_files(files, weights[: len(files)], method=method, **options)
    return {name: made.delta(name, value.shape) for name, value in like.items() if name in made.modules}


def settings(method: str) -> dict[str, Any]:
    return {"density": 0.6} if method.removesuffix("_svd") in THINNED else {}


@pytest.mark.parametrize(
    ("method", "sign"),
    [*((name, "total") for name in DETERMINISTIC), ("ties", "frequency"), ("ties_svd", "frequency")],
)
def test_every_deterministic_method(method: str, sign: str, tmp_path: Path) -> None:
    """PEFT's `linear` is `peft_linear` here; in its own adapters every scale is another."""
    elects = method.startswith("ties")
    model, files = adapted(tmp_path)
    theirs = combine(model, method, 3, majority_sign_method=sign, **settings(method))
    options = settings(method) | ({"majority_sign": sign} if elects else {})
    found = ours(files, theirs, "peft_linear" if method == "linear" else method, **options)
    assert set(found) == {"embed", "conv", "up", "extra"}
    assert_close(found, {name: theirs[name] for name in found})


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_different_ranks(method: str, tmp_path: Path) -> None:
    model, files = adapted(tmp_path, ranks=(2, 4))
    targets = {"svd_rank": 3} if method != "cat" else {}
    theirs = combine(model, method, 2, **settings(method), **targets)
    assert_close(ours(files, theirs, method, **settings(method), **({"rank": 3} if targets else {})), theirs)


def test_composition_loads_in_peft(tmp_path: Path) -> None:
    model, files = adapted(tmp_path / "given")
    theirs = combine(model, "cat", 3)
    made, _ = compose_files(files, WEIGHTS, method="cat")
    write_peft(tmp_path / "made", made)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path / "made").eval()
    assert_close(deltas(loaded, "default"), theirs)
    model.set_adapter("made")
    x = torch.arange(10).reshape(2, 5)
    base = model.get_base_model()
    for name in ("embed", "conv", "up", "extra"):
        getattr(loaded.base_model.model, name).base_layer.load_state_dict(getattr(base, name).base_layer.state_dict())
    with torch.no_grad():
        assert_close(loaded(x).numpy(), model(x).numpy())


@pytest.mark.parametrize("method", RANDOM)
def test_dare_with_the_same_masks(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws from PyTorch's global state; given our masks in its order, it computes the same."""
    targets = [["up", "extra"]] * 2
    model, files = adapted(tmp_path, ranks=(3, 3), targets=targets)
    key = jax.random.key(5)
    masks = iter(_masks(key, method.endswith("_svd")))
    monkeypatch.setattr(torch, "bernoulli", lambda given: torch.from_numpy(next(masks)).reshape(given.shape).float())
    theirs = combine(model, method, 2, density=0.6)
    assert next(masks, None) is None
    assert_close(ours(files, theirs, method, density=0.6, key=key), theirs)


def _masks(key: jax.Array, dense: bool) -> list[np.ndarray]:
    """What is drawn for both layers: for the updates, or for A and B, of the first adapter and of the second."""
    found = []
    for name, (outputs, inputs) in {"up": (9, 6), "extra": (4, 9)}.items():
        own = jax.random.split(jax.random.fold_in(key, crc32(name.encode())), 1)[0]
        keys, shapes = ([own], [(inputs, outputs)]) if dense else (jax.random.split(own), [(3, inputs), (3, outputs)])
        for which, (each, shape) in enumerate(zip(keys, shapes, strict=True)):
            for adapter in range(2):
                mask = np.array(jax.random.bernoulli(jax.random.fold_in(each, adapter), 0.6, shape))
                found.append(np.ascontiguousarray(mask.T if dense or which else mask))
    return found


def exact(model: Any, count: int) -> dict[str, np.ndarray]:
    """The weighted sum of what the adapters add."""
    parts = [deltas(model, f"a{i}") for i in range(count)]
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: np.sum([w * part[name] for w, part in zip(WEIGHTS, parts, strict=False) if name in part], 0)
        for name in names
    }


def test_linear_is_the_sum_that_peft_misses(tmp_path: Path) -> None:
    model, files = adapted(tmp_path, ranks=(2, 2))
    desired = exact(model, 2)
    assert_close(ours(files, desired, "linear", rank=4), desired)
    theirs = combine(model, "linear", 2)
    assert np.linalg.norm(theirs["up"] - desired["up"]) > 0.3 * np.linalg.norm(desired["up"])


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_rslora_is_the_sum_that_peft_enlarges(method: str, tmp_path: Path) -> None:
    """Its new adapter is rsLoRA with alpha equal to the rank: what was to be a scale of 1 is the rank's root."""
    model, files = adapted(tmp_path, ranks=(2, 2), use_rslora=True)
    desired = exact(model, 2)
    assert_close(ours(files, desired, method, **({} if method == "cat" else {"rank": 4})), desired)


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_scales_count_once_in_both(method: str, tmp_path: Path) -> None:
    model, files = adapted(tmp_path, ranks=(2,))
    options = {"density": 1.0} if method != "svd" else {}
    desired = {name: WEIGHTS[0] * value for name, value in deltas(model, "a0").items()}
    assert_close(ours(files, desired, method, **options), desired)


def test_magnitudes_and_biases_that_peft_drops(tmp_path: Path) -> None:
    targets = [["up", "extra"]] * 2
    _, files = adapted(tmp_path / "dora", ranks=(2, 2), targets=targets, use_dora=True)
    made, _ = compose_files(files, [0.25, 0.75])
    sizes = [each.modules["up"].magnitude for each in files]
    assert_close(made.modules["up"].magnitude, np.float32(0.25 * sizes[0] + 0.75 * sizes[1]))
    _, files = adapted(tmp_path / "bias", ranks=(2, 2), targets=targets, lora_bias=True)
    made, _ = compose_files(files, WEIGHTS[:2])
    desired = sum(w * each.scale("up") * each.modules["up"].b_bias for w, each in zip(WEIGHTS, files, strict=False))
    assert_close(made.modules["up"].b_bias, np.float32(desired))
