"""Vision models of flaxmodels (linen): residual networks and VGG."""

from typing import Any

import jax
import pytest
from zoo_model import Model, Row, check_merged, check_quantised, check_routed, check_sites, numbers, pixels

HEAD = ("params/Dense_0/kernel",)


def build(cls: str, **settings: Any) -> Model:
    import flaxmodels

    model = getattr(flaxmodels, cls)(output="logits", pretrained=None, normalize=False, num_classes=5, **settings)
    images = pixels(2, 32, 32, 3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    filled = numbers(variables, size=0.03)  # residual sums of many layers, which these statistics do not normalise
    return Model(lambda variables, x: model.apply(variables, x, train=False), filled, (images,))


ROWS = {
    "ResNet-18": Row(lambda: build("ResNet18"), 21, HEAD, {"params/BasicBlock_0/Conv_0/kernel": "conv"}),
    "ResNet-50": Row(lambda: build("ResNet50"), 54, HEAD, {"params/Bottleneck_0/Conv_2/kernel": "conv"}),
    "VGG-16": Row(lambda: build("VGG16", include_head=False), 13, ("params/conv5_3/kernel",), {"params/conv1_1/kernel": "conv"}),
}  # fmt: skip
pytestmark = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("flaxmodels", exc_type=ImportError)


def test_sites(row: Row) -> None:
    check_sites(row)


def test_routed(row: Row) -> None:
    check_routed(row)


def test_adapted_is_merged(row: Row) -> None:
    check_merged(row)


def test_quantised(row: Row) -> None:
    check_quantised(row)
