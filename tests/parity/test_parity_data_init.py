"""EVA, CorDA and LoRA-GA beside PEFT's, on the same model and data: subspaces, ranks, products and factors agree."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
import numpy as np
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

import lora_jax as lora

SIZES = {"up": (24, 40), "middle": (40, 32), "down": (32, 20)}
KEY = jax.random.key(0)


class Net(nn.Module):
    """Three linear layers."""

    def __init__(self):
        super().__init__()
        for name, (into, out) in SIZES.items():
            setattr(self, name, nn.Linear(into, out, bias=False))

    def forward(self, x):
        """The layers in turn."""
        return self.down(torch.tanh(self.middle(torch.tanh(self.up(x)))))


def model(p, x):
    return jnp.tanh(jnp.tanh(x @ p["up"]) @ p["middle"]) @ p["down"]


def loss(p, x):
    return (model(p, x) ** 2).mean()


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net()


def weights(net):
    return {name: jnp.asarray(getattr(net, name).weight.detach().numpy().T.copy()) for name in SIZES}


def data(count, tokens=200):
    """Batches whose components stand apart, so that singular vectors are well defined."""
    draw = np.random.default_rng(1)
    spread = 1.5 * 0.75 ** np.arange(24)
    rotation = np.linalg.qr(draw.normal(size=(24, 24)))[0]
    return [np.float32(draw.normal(size=(tokens, 24)) * spread @ rotation) for _ in range(count)]


def ours(net, init, what, batches, rank=4, **fields):
    """Our config, what was captured, and the adapter."""
    params = weights(net)
    config = lora.LoraConfig(rank=rank, alpha=8, init=init, targets=tuple(SIZES), **fields)
    captured = lora.capture(loss, params, batches, what, config=config, passes=4)
    return config, captured, lora.init(KEY, config, params, lora.find_sites(model, params, batches[0]), captured)


def theirs(**fields):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(SIZES), **fields)


def product(peft_model, name):
    """PEFT's start, `[fan_in, fan_out]`, scale included."""
    return peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().numpy().T


def started(update):
    return np.asarray(2 * jnp.einsum("ri,ro->io", update.a_start, update.b_start))


def test_eva_components_and_ranks(net):
    """One batch again and again, as PEFT's incremental PCA forgets: then both see the same covariance."""
    (x,) = data(1)
    loader = [{"x": torch.from_numpy(x)}]
    config = theirs(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.999))
    peft_model = get_peft_model(net, config)
    own = {
        "forward_fn": lambda model, inputs: model(inputs["x"]),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    state = get_eva_state_dict(peft_model, loader, **own)
    ranks = {name.split(".")[-1]: len(each) for name, each in state.items()}
    components = {name.split(".")[-1]: each.numpy() for name, each in state.items()}
    ours_config, captured, _ = ours(net_of(peft_model), "eva", "components", [x])
    new = lora.redistribute(ours_config, captured)
    assert {name: new.rank_for(name) for name in SIZES} == ranks
    for name, rows in components.items():
        assert np.abs(np.sum(rows * np.asarray(captured[name].vectors)[: len(rows)], 1) - 1).max() < 2e-3  # signs too
    initialize_lora_eva_weights(peft_model, loader, eva_state_dict=state, **own)
    adapter = lora.init(KEY, new, weights(net_of(peft_model)), sites(x), captured)
    for name in SIZES:
        layer = peft_model.base_model.model.get_submodule(name)
        assert float(adapter[name].scale) == layer.scaling["default"]
        assert adapter[name].rank == layer.r["default"]


def net_of(peft_model):
    """The base layers of an adapted model."""
    inner = peft_model.base_model.model
    found = Net()
    for name in SIZES:
        setattr(found, name, inner.get_submodule(name).base_layer)
    return found


def sites(x):
    return lora.find_sites(model, weights(Net()), x)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_products(net, method):
    """One batch: with more, PEFT weights each by its largest input."""
    pytest.importorskip("attr")
    from peft.tuners.lora.corda import preprocess_corda

    (x,) = data(1)
    _, _, adapter = ours(net, f"corda-{method}", "inputs", [x])
    config = theirs(init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
    preprocess_corda(net, config, run_model=lambda: net(torch.from_numpy(x)))
    peft_model = get_peft_model(net, config)
    for name in SIZES:
        exact = product(peft_model, name)
        np.testing.assert_allclose(started(adapter[name]), exact, atol=2e-3 * np.abs(exact).max())


def aligned(rows, like):
    """Rows with the signs of others."""
    return rows * np.sign(np.sum(rows * like, 1, keepdims=True))


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_factors(net, direction, scale):
    """Up to the sign of each row, which PEFT leaves to the solver.

    The largest singular value of a weight is exact here; PEFT's sketch of it, as wide as the rank, is 1% too small.
    """
    batches = data(2)
    _, captured, adapter = ours(net, f"lora-ga:{direction}:{scale}", "gradient", batches)
    own = LoraGAConfig(direction=direction, scale=scale)
    config = theirs(init_lora_weights="lora_ga", lora_ga_config=own)

    def step():
        for x in batches:
            (net(torch.from_numpy(x).requires_grad_()) ** 2).mean().backward()

    preprocess_loraga(net, config, train_step=step)
    for name in SIZES:
        gradient = getattr(net, name)._peft_loraga_grad.numpy().T
        np.testing.assert_allclose(captured[name].mean, gradient, atol=1e-5 * np.abs(gradient).max())
    torch.manual_seed(0)
    peft_model = get_peft_model(net, config)
    for name in SIZES:
        layer = peft_model.base_model.model.get_submodule(name)
        a, b = (each["default"].weight.detach().numpy() for each in (layer.lora_A, layer.lora_B))
        for mine, other in ((adapter[name].a, a), (adapter[name].b, b.T)):
            error = np.abs(aligned(np.asarray(mine), other) - other).max()
            assert error < (2e-2 if scale == "weight_svd" else 2e-3) * np.abs(other).max()


def test_lora_ga_at_random(net):
    """The same numbers for A and B, each one of the first eight: which, is chance."""
    batches = data(1)
    _, _, adapter = ours(net, "lora-ga:random:unit", "gradient", batches)
    own = LoraGAConfig(direction="random", scale="unit")
    config = theirs(init_lora_weights="lora_ga", lora_ga_config=own)
    preprocess_loraga(
        net, config, train_step=lambda: (net(torch.from_numpy(batches[0]).requires_grad_()) ** 2).mean().backward()
    )
    gradients = {name: getattr(net, name)._peft_loraga_grad.numpy().T for name in SIZES}
    peft_model = get_peft_model(net, config)
    for name in SIZES:
        left, _, right = np.linalg.svd(gradients[name])
        layer = peft_model.base_model.model.get_submodule(name)
        a, b = (each["default"].weight.detach().numpy() for each in (layer.lora_A, layer.lora_B))
        for one, two in ((np.asarray(adapter[name].a), np.asarray(adapter[name].b)), (a, b.T)):
            chosen = np.abs(one @ left[:, :8]).argmax(1)
            assert len({*chosen}) == 4
            np.testing.assert_array_equal(chosen, np.abs(two @ right[:8].T).argmax(1))
