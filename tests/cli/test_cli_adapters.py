"""The verbs that work on adapters and checkpoints on disk: merge, convert, inspect."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same, random_adapter
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.io.inspect import inspect

SAVED = sorted(file.parent.name for file in GOLDEN.glob("*/expected.safetensors") if "vera" not in file.parent.name)


def mlp(params, x):
    h = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, params["layers_0"]["up"]["kernel"]))
    return jnp.einsum("bhd,hdo->bo", h, params["layers_0"]["down"]["kernel"])


PARAMS = {"layers_0": {"up": {"kernel": jnp.ones((5, 2, 3))}, "down": {"kernel": jnp.ones((2, 3, 4))}}}


@pytest.fixture
def adapter() -> lora.Adapter:
    return random_adapter(lora.find_sites(mlp, PARAMS, jnp.ones((2, 5))))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    expected = load_file(GOLDEN / "linear" / "expected.safetensors")
    state = {key.removeprefix("base."): value for key, value in expected.items() if key.startswith("base.")}
    save_file(state, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def test_merge(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(base), str(GOLDEN / "linear"), str(out)]) == 0
    said, progress = capsys.readouterr()
    assert "merging: megabyte 1/1, 100%, 0 s left" in progress
    assert f"{out}: 6 of" in " ".join(said.split())
    expected = load_file(GOLDEN / "linear" / "expected.safetensors")
    merged = load_file(out / "model.safetensors")
    assert_close(merged, {name: expected[f"merged.{name}"] for name in merged})


def test_merge_with_weights_says_what_it_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "pytorch_model.bin").write_bytes(b"")
    paths = [str(base), *[str(GOLDEN / "linear")] * 2, str(tmp_path / "merged")]
    assert main(["merge", *paths, "--weights", "0.25", "0.75", "--rounding", "stochastic", "--seed", "3"]) == 0
    assert "pytorch_model.bin" in capsys.readouterr().out
    expected = load_file(GOLDEN / "linear" / "expected.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert_close(merged, {name: expected[f"merged.{name}"] for name in merged})


def test_merge_stopped_by_ctrl_c(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_jax.io.hf.merge.write_file", stop)
    assert main(["merge", str(base), str(GOLDEN / "linear"), str(tmp_path / "merged")]) == 130
    assert capsys.readouterr().err == "lora-jax: stopped; nothing was left behind\n"
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


_SLOW = """
import sys, time, lora_jax.io.hf.merge as merge
def write_file(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(60)
merge.write_file = write_file
from lora_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_merge_stopped_by_sigterm(base: Path, tmp_path: Path) -> None:
    paths = [str(base), str(GOLDEN / "linear"), str(tmp_path / "merged")]
    run = subprocess.Popen([sys.executable, "-c", _SLOW, "merge", *paths], stdout=PIPE, stderr=PIPE, text=True)
    assert run.stdout is not None and any("writing" in line for line in run.stdout)
    assert len(list(tmp_path.iterdir())) == 2, "the hidden directory stands beside OUT"
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=30)
    assert (run.returncode, said) == (143, "lora-jax: stopped; nothing was left behind\n")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_the_handler_of_sigterm_is_put_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("lora_jax.io.hf.merge.write_file", stop)
    arguments = ["merge", str(base), str(GOLDEN / "linear"), str(tmp_path / "merged")]
    assert main(arguments) == 143
    assert signal.getsignal(signal.SIGTERM) is former
    monkeypatch.undo()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0], "no thread but the main one may set handlers"


def test_convert_there_and_back(adapter: lora.Adapter, tmp_path: Path) -> None:
    first, peft, back = (str(tmp_path / name) for name in ("orbax", "peft", "back"))
    lora.save(first, adapter, params=PARAMS)
    assert main(["convert", first, peft, "--base-model", "some/model", "--task-type", "CAUSAL_LM"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/model", "CAUSAL_LM")
    assert main(["convert", peft, back, "--like", first]) == 0
    assert_same(lora.load(back, PARAMS), adapter)
    with pytest.raises(lora.CheckpointError, match="another base"):
        lora.load(back, {"layers_0": PARAMS["layers_0"] | {"more": jnp.ones(3)}})


def test_convert_to_one_rank_and_one_scale(adapter: lora.Adapter, tmp_path: Path) -> None:
    lora.save(tmp_path / "orbax", adapter)
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "peft"), "--uniform"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)


def test_convert_from_an_adapter_without_a_recorded_base(adapter: lora.Adapter, tmp_path: Path) -> None:
    first, peft, back = (str(tmp_path / name) for name in ("orbax", "peft", "back"))
    lora.save(first, adapter)
    assert main(["convert", first, peft]) == 0
    assert main(["convert", peft, back, "--like", first]) == 0
    assert_same(lora.load(back, PARAMS | {"more": jnp.ones(3)}), adapter)


def test_convert_brings_dora_back_with_its_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, peft, back, plain = (str(tmp_path / name) for name in ("orbax", "peft", "back", "plain"))
    sites, config = lora.find_sites(mlp, PARAMS, jnp.ones((2, 5))), lora.LoraConfig(rank=2, method="dora")
    adapter = lora.init(jax.random.key(0), config, PARAMS, sites)
    lora.save(first, adapter, params=PARAMS)
    lora.save(plain, random_adapter(sites), params=PARAMS)
    assert main(["convert", first, peft]) == 0
    assert main(["convert", peft, back, "--like", first]) == 0
    assert_same(lora.load(back, PARAMS), adapter)
    assert main(["convert", peft, str(tmp_path / "again"), "--like", plain]) == 2
    assert "give a DoRA adapter of the same base as --like" in capsys.readouterr().err


def test_convert_takes_the_table_beside_its_factors_for_the_bases(tmp_path: Path) -> None:
    params = {"embed": {"embedding": jnp.ones((9, 4))}}
    sites = lora.find_sites(lambda p, t: p["embed"]["embedding"][t], params, jnp.ones(3, int))
    first, peft, back = (str(tmp_path / name) for name in ("orbax", "peft", "back"))
    adapter = random_adapter(sites)
    lora.save(first, adapter, params=params)
    lora.peft.save(peft, adapter, sites=sites, params=params, save_embedding_layers=True)
    assert main(["convert", peft, back, "--like", first]) == 0
    assert_same(lora.load(back, params), adapter)


@pytest.mark.parametrize("name", [*SAVED, "dora", "tokens"])
def test_inspect_measures_what_pefts_files_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(GOLDEN / name)
    files = lora.peft.read_peft(GOLDEN / name)
    assert found.format == "peft"
    assert [entry.name for entry in found.entries] == [*files.modules, *files.saved]
    assert found.nbytes == sum(
        array.nbytes for array in load_file(GOLDEN / name / "adapter_model.safetensors").values()
    )
    for entry in found.entries:
        module = files.modules.get(entry.name)
        if module is not None and module.kind in ("linear", "conv"):
            b = module.b if module.values is None else module.b * module.values
            delta = files.scale(entry.name) * np.tensordot(b.reshape(len(b), -1), module.a, 1)
            assert entry.shape == delta.shape
            np.testing.assert_allclose(entry.norms[2], np.linalg.norm(delta), rtol=1e-5)
    assert main(["inspect", str(GOLDEN / name)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(found.entries)} PEFT modules" in shown


def test_inspect_experts_counts_every_expert() -> None:
    files = lora.peft.read_peft(GOLDEN / "experts")
    shapes = {"layer.gate_up_proj": (3, 10, 6), "layer.down_proj": (3, 6, 5)}
    owners = files.owners(shapes)
    assert sorted(owners) == sorted(shapes)
    by_name = {entry.name: entry for entry in inspect(GOLDEN / "experts").entries}
    for parameter, shape in shapes.items():
        entry = by_name[owners[parameter]]
        assert (entry.shape, entry.rank) == (shape, {"gate_up_proj": 2, "down_proj": 3}[parameter.rpartition(".")[2]])
        assert entry.scale == files.scale(entry.name, parameter, experts=3)
        delta = files.delta(entry.name, shape, parameter=parameter)
        np.testing.assert_allclose(entry.norms[2], np.linalg.norm(delta), rtol=1e-5)


def test_inspect_leaves_blank_what_the_file_does_not_tell(tmp_path: Path) -> None:
    files = lora.peft.read_peft(GOLDEN / "experts_transposed")
    config = {**files.config, "alpha_pattern": {"layer.down_proj": 3}}
    lora.peft.write_peft(tmp_path / "adapter", lora.peft.PeftFiles(config, files.modules))
    for entry in inspect(tmp_path / "adapter").entries:
        assert (entry.alpha, entry.scale, entry.norms[2]) == (None, None, None)
        assert (entry.rank, entry.shape[0]) == (2, 3)


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = lora.peft.Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
    folder = tmp_path / "with [bold] and [/x]"
    lora.peft.write_peft(folder, lora.peft.PeftFiles({"r": 2, "target_modules": ["a[/b]"]}, {"a[/b]": module}))
    assert main(["inspect", str(folder)]) == 0
    assert "a[/b]" in capsys.readouterr().out


def test_inspect_our_own_format(adapter: lora.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = lora.LoraConfig(rank=2, targets="up", rslora=True)
    bias = lora.Replace(jnp.full(3, 2.0), lora.Site(path="b", shape=(3,), dtype="float32", kind="full"))
    stacked = lora.Site(path="s", shape=(3, 4, 5), dtype="float32", kind="dense", in_axes=(1,), out_axes=(2,), batch_axes=(0,))  # fmt: skip  # noqa: E501
    whole = lora.Adapter({**adapter, "b": bias, **random_adapter([stacked], seed=1)})
    lora.save(tmp_path / "orbax", whole, config=config)
    found = inspect(tmp_path / "orbax")
    assert [entry.name for entry in found.entries] == sorted(whole)
    for entry in found.entries:
        update = whole[entry.name]
        size = np.linalg.norm(update.delta() if isinstance(update, lora.LowRank) else bias.value)
        np.testing.assert_allclose(entry.norms[2], size, rtol=1e-5)
        assert entry.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(update))
        if isinstance(update, lora.LowRank):
            np.testing.assert_allclose(entry.alpha, np.abs(np.asarray(update.scale)).max() * 2**0.5, rtol=1e-6)
    assert main(["inspect", str(tmp_path / "orbax")]) == 0
    assert "layers_0/down/kernel" in capsys.readouterr().out


REFUSED = {
    "merge base lora": "merge takes BASE ADAPTER [ADAPTER ...] OUT, and got 2 paths",
    "merge": "merge takes BASE ADAPTER [ADAPTER ...] OUT",
    "inspect nowhere": "There is nothing at nowhere",
    "inspect .": "Its subdirectories orbax, peft are adapters",
    "convert peft out": "give --like ADAPTER",
    "convert orbax out --like orbax": "--like and --alpha are for the other direction",
    "convert peft out --like orbax --task-type X": "leave them out",
    "convert peft out --like orbax --uniform": "leave them out",
    "convert orbax peft": "peft exists already",
    "convert peft out --like peft": "must be an adapter that lora_jax.save wrote",
    "convert orbax out --names nothing": "nothing",
    "convert orbax out --names tunix": "Known maps for --names",
    "merge nowhere peft out": "nowhere is not a directory",
    "merge . peft out": "holds no safetensors file",
}


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_line_and_write_nothing(
    args: str,
    adapter: lora.Adapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lora.save(tmp_path / "orbax", adapter)
    lora.peft.save(tmp_path / "peft", adapter)
    before = sorted(tmp_path.rglob("*"))
    assert main(args.split()) in (1, 2)
    complaint = capsys.readouterr().err
    assert complaint.startswith("lora-jax: ")
    assert complaint.count("\n") == 1
    assert REFUSED[args] in complaint
    assert sorted(tmp_path.rglob("*")) == before
