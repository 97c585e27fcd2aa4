"""Real PEFT and lora_jax on the same layers: outputs and merged weights agree, whoever wrote the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from golden.make import CASES as TORCH_CASES
from helpers import assert_close, random_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import CASES, SCANNED, from_torch, scanned_net, stacked
from safetensors.numpy import load_file
from torch_side import adapted, numbers, opened, run

import lora_jax as lora
from lora_jax.adapter.site import full_site
from lora_jax.paths import named_leaves

NET: dict[str, dict[str, Any]] = {
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "a regex": {"r": 2, "target_modules": r".*\.1\.attn\.(q|v)"},
    "excluded": {"r": 2, "target_modules": ["q", "v"], "exclude_modules": ["layers.0.attn.q"]},
    "some layers": {"r": 2, "target_modules": ["q", "embed"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "order of patterns": {"r": 2, "target_modules": ["q", "up"], "rank_pattern": {"0.attn.q": 3, "attn.q": 4}, "alpha_pattern": {"up|q": 3, "attn.q": 5}},
    "rsLoRA with patterns": {"r": 2, "target_modules": ["q", "up"], "use_rslora": True, "rank_pattern": {"up": 4}, "alpha_pattern": {"q": 3}},
    "everything": {"r": 2, "target_modules": ["q", "v", "up", "embed"], "modules_to_save": ["head"], "bias": "all"},
    "gaussian": {"r": 2, "target_modules": ["q"], "init_lora_weights": "gaussian"},
    "dropout": {"r": 2, "target_modules": ["q"], "lora_dropout": 0.5},
    "DoRA with everything else": {"r": 2, "use_dora": True, "target_modules": ["q", "v", "up", "embed"], "modules_to_save": ["head"], "bias": "all", "use_rslora": True, "rank_pattern": {"up": 4}},
    "a bias on B and patterns": {"r": 2, "lora_bias": True, "target_modules": ["q", "up"], "rank_pattern": {"up": 4}, "alpha_pattern": {"q": 3}},
    "tokens beside modules": {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"], "trainable_token_indices": {"embed": [9, 2, 5]}},
}  # fmt: skip
LOADED = {name: (name, options) for name, (_, _, options) in TORCH_CASES.items()} | {
    name: ("linear", options) for name, options in NET.items()
}


def torch_base(case: str) -> tuple[Any, Any]:
    """A base that is the same at every call, and an input."""
    torch.manual_seed(7)
    build, example, _ = TORCH_CASES[case]
    return build(), example()


class Jax:
    """The JAX model with the weights of a PyTorch base."""

    def __init__(self, case: str):
        self.case = CASES[case]
        base, x = torch_base(case)
        self.x = jnp.asarray(x.numpy())
        self.params = self.convert(base)
        self.sites = lora.find_sites(self.case.fn, self.params, self.x)

    def convert(self, model: Any) -> Any:
        return from_torch(numbers(model.state_dict()), transposed=self.case.transposed)

    def run(self, adapter: lora.Adapter) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(lora.adapt(self.case.fn)(self.params, adapter, self.x))


@pytest.mark.parametrize(("case", "options"), LOADED.values(), ids=LOADED)
def test_written_by_peft(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, (base, x) = Jax(case), torch_base(case)
    adapted(base, **options).save_pretrained(tmp_path)
    adapter = lora.peft.load(tmp_path, ours.params, ours.sites, ours.case.names)
    # Not the model that was saved: PEFT sorts the keys of its patterns when it writes them, and the first match wins.
    model = PeftModel.from_pretrained(torch_base(case)[0], tmp_path).eval()
    expected = run(model, x)
    assert_close(ours.run(adapter), expected)
    assert_close(lora.merge(ours.params, adapter), ours.convert(model.merge_and_unload()))
    assert np.abs(expected - run(torch_base(case)[0], x)).max() > 0.1


FACTORS = sorted(set(TORCH_CASES) - {"patterns", "rslora"})
WHOLE = ["linear", "bias_all"]
READ = [*((case, False) for case in FACTORS), *((case, True) for case in WHOLE)]


@pytest.mark.parametrize(("case", "whole"), READ, ids=[f"{case}{' and whole modules' * whole}" for case, whole in READ])
def test_read_by_peft(case: str, whole: bool, tmp_path: Path) -> None:
    ours, (base, x) = Jax(case), torch_base(case)
    chosen = _chosen(case, ours, whole)
    lora.peft.save(tmp_path / "a", chosen, ours.case.names, sites=ours.sites, params=ours.params)
    model = opened(base, tmp_path / "a")
    expected = ours.run(chosen)
    assert_close(run(model, x), expected)
    assert_close(ours.convert(model.merge_and_unload()), lora.merge(ours.params, chosen))
    assert np.abs(expected - ours.run(lora.Adapter({}))).max() > 0.1


def dora(update: Any, params: Any) -> lora.methods.Dora:
    """The update with magnitudes that are not the weight's."""
    made = lora.methods.Dora.around(update, named_leaves(params)[0][update.site.path])
    return replace(made, magnitude=made.magnitude * jnp.linspace(0.5, 2, made.magnitude.size))


def _chosen(case: str, ours: Jax, whole: bool) -> lora.Adapter:
    """Factors of another rank for every site that the case adapts, and values for whole parameters of the net."""
    parts = {"linear": ("q", "up", "head"), "embedding": ("embed",), "bias_all": ("q",)}.get(case, ("",))
    paths = [path for path in ours.sites if any(part in path for part in parts)]
    found: dict[str, lora.Update] = {
        path: random_adapter(ours.sites, rank=1 + place)[path] for place, path in enumerate(paths)
    }
    if case.startswith("dora"):
        found = {path: dora(update, ours.params) for path, update in found.items()}
    if case == "tokens":
        table = ours.sites["embed/embedding"]
        found = {
            "layers_1/up/kernel": found["layers_1/up/kernel"],
            table.path: lora.methods.Rows(jnp.eye(2, 5), table, (7, 3)),
        }
    if case == "lora_bias":
        found = {path: found[path] for path in ("layers_1/attn/q/kernel", "layers_0/up/kernel")}
        bias = full_site("layers_1/attn/q/bias", jnp.zeros(7))
        found[bias.path] = lora.methods.Shift(jnp.arange(7.0), jnp.float32(0.3), bias)
    if not whole:
        return lora.Adapter(found)
    found.pop("head/kernel", None)
    config = lora.LoraConfig(targets=("layers_0.attn.q",), train=("head",), bias="all" if "bias" in case else "none")
    drawn = lora.init(jax.random.key(0), config, ours.params, ours.sites)
    for path, update in drawn.items():
        if isinstance(update, lora.Replace):
            found[path] = lora.Replace(update.value * 2 + 1, update.site)
    return lora.Adapter(found)


@pytest.mark.parametrize("axis", ["written by PEFT", "read by PEFT"])
def test_scanned_layers(axis: str, tmp_path: Path) -> None:
    ours, (base, x) = Jax("linear"), torch_base("linear")
    params = stacked(ours.params)
    sites = lora.find_sites(scanned_net, params, ours.x)
    if axis == "read by PEFT":
        adapter = random_adapter(sites)
        lora.peft.save(tmp_path / "a", adapter, SCANNED, sites=sites)
        model = opened(base, tmp_path / "a")
    else:
        model = adapted(base, r=2, target_modules=["q", "v", "up", "embed"], rank_pattern={"layers.1.up": 4})
        model.save_pretrained(tmp_path / "a")
        adapter = lora.peft.load(tmp_path / "a", params, sites, SCANNED)
    with jax.default_matmul_precision("highest"):
        assert_close(np.asarray(lora.adapt(scanned_net)(params, adapter, ours.x)), run(model, x))
    assert_close(lora.merge(params, adapter), stacked(ours.convert(model.merge_and_unload())))


def test_named_adapters_are_in_subfolders(tmp_path: Path) -> None:
    ours, (base, x) = Jax("linear"), torch_base("linear")
    model = adapted(base, "style", r=2, target_modules=["q"])
    model.save_pretrained(tmp_path)
    adapter = lora.peft.load(tmp_path, ours.params, ours.sites, subfolder="style")
    assert_close(ours.run(adapter), run(model, x))


def test_compiled_models_have_other_keys(tmp_path: Path) -> None:
    ours, (base, x) = Jax("linear"), torch_base("linear")
    model = adapted(torch.compile(base, backend="eager"), r=2, target_modules=["q", "up"])
    model.save_pretrained(tmp_path)
    assert all("._orig_mod." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert_close(ours.run(lora.peft.load(tmp_path, ours.params, ours.sites)), run(model, x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base(init: str, tmp_path: Path) -> None:
    ours, (base, x) = Jax("linear"), torch_base("linear")
    options = {"r": 2, "target_modules": ["q", "up"], "init_lora_weights": init}
    model = get_peft_model(base, LoraConfig(**options))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape) / 3)
    model.eval().save_pretrained(tmp_path / "plain")
    expected = run(model, x)
    with pytest.raises(lora.CheckpointError, match="changes the base's weights"):
        lora.peft.load(tmp_path / "plain", ours.params, ours.sites)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    adapter = lora.peft.load(tmp_path / "converted", ours.params, ours.sites)
    assert_close(ours.run(adapter), expected, factor=10)  # the singular value decomposition rounds in PyTorch


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", ["HWIO", "OIHW", "OHWI", "IHWO"])
def test_convolutions(layout: str, groups: int, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(9)
        return torch.nn.Sequential(torch.nn.Conv2d(2 * groups, 6, (3, 1), groups=groups, padding=(1, 0)))

    def params(model: Any) -> Any:
        weight = numbers(model.state_dict())["0.weight"]
        return {"0": {"kernel": jnp.asarray(weight.transpose(["OIHW".index(axis) for axis in layout]))}}

    def fn(params: Any, x: Any) -> Any:
        kernel, names = params["0"]["kernel"], ("NCHW", layout, "NCHW")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(1, 1), (0, 0)], dimension_numbers=names, feature_group_count=groups
        )

    ours, x = params(base()), torch.randn(2, 2 * groups, 5, 4)
    sites = lora.find_sites(fn, ours, jnp.asarray(x.numpy()))
    adapter = random_adapter(sites)
    lora.peft.save(tmp_path / "a", adapter, sites=sites)
    model = opened(base(), tmp_path / "a")
    bias = base()[0].bias.detach().numpy().reshape(-1, 1, 1)
    with jax.default_matmul_precision("highest"):
        assert_close(run(model, x), np.asarray(lora.adapt(fn)(ours, adapter, jnp.asarray(x.numpy()))) + bias)
    theirs = adapted(base(), r=6, target_modules=["0"])
    theirs.save_pretrained(tmp_path / "b")
    if groups > 1:
        with pytest.raises(lora.CheckpointError, match="PEFT's A reads every input channel"):
            lora.peft.load(tmp_path / "b", ours, sites)
    else:
        loaded = lora.peft.load(tmp_path / "b", ours, sites)
        assert_close(lora.merge(ours, loaded), params(theirs.merge_and_unload()))
