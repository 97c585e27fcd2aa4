"""Several devices and several processes give the losses of one device; a mesh that means nothing is refused."""

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import in_two_processes

from lora_jax.cli import main
from lora_jax.train.mesh import MeshError, sizes_of
from lora_jax.train.metrics import read_metrics

PLAIN = "--length 32 --batch 4 --steps 4 --eval-every 2 --eval-batches 1 --lr 0.01 --warmup 1"


def losses(out: Path) -> list[float]:
    records = read_metrics(out / "metrics.jsonl")
    return [record[name] for record in records for name in ("loss", "norm", "eval_loss") if name in record]


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """On one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *PLAIN.split()]) == 0
    return losses(out)


MESHES = ["data=2,fsdp=2,tensor=2", "data=4,tensor=2", "fsdp=4,tensor=2", "tensor=8"]


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=pytest.mark.full if m != MESHES[0] else ()) for m in MESHES])
def test_eight_devices_give_the_losses_of_one(
    mesh: str, model: Path, data: Path, alone: list[float], tmp_path: Path
) -> None:
    args = ["finetune", "--model", str(model), "--data", str(data), *PLAIN.split(), "--mesh", mesh]
    assert main([*args, "--out", str(tmp_path / "out")]) == 0
    np.testing.assert_allclose(losses(tmp_path / "out"), alone, rtol=1e-5)


@pytest.mark.full
def test_two_processes_give_the_losses_of_one(model: Path, data: Path, alone: list[float], tmp_path: Path) -> None:
    args = ["finetune", "--model", str(model), "--data", str(data), *PLAIN.split(), "--out", str(tmp_path / "out")]
    in_two_processes([*args, "--mesh", "data=2,fsdp=2"])
    np.testing.assert_allclose(losses(tmp_path / "out"), alone, rtol=1e-5)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=x", "model=2", "data=2;tensor=2"])
def test_a_mesh_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(MeshError, match="data=NUMBER, fsdp=NUMBER, tensor=NUMBER"):
        sizes_of(text)
