"""`lora-jax compose`: adapters on disk made into one, in either format, without the base."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, assert_close, assert_same, random_adapter
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.cli import main
from lora_jax.io.compose import base_values, compose_files
from lora_jax.io.hf.folder import open_checkpoint
from lora_jax.io.peft import Module, PeftFiles, read_peft, write_peft
from lora_jax.io.peft.files import TOKEN_ROWS, full_tensors, token_rows

COMPOSABLE = [
    file.parent.name
    for file in sorted(GOLDEN.glob("*/expected.safetensors"))
    if not file.parent.name.startswith(("experts", "adalora", "vera"))
]


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["layers_0"]["up"]["kernel"]) @ params["layers_0"]["down"]["kernel"]


PARAMS = {"layers_0": {"up": {"kernel": jnp.ones((5, 6))}, "down": {"kernel": jnp.ones((6, 4))}}}
SITES = lora.find_sites(mlp, PARAMS, jnp.ones((2, 5)))


KNOTS = {"method": "knots", "density": 1.0, "majority_sign": "frequency"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters in each format."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        adapter = random_adapter(SITES, seed, rank=2 + seed)
        lora.save(name, adapter, params=PARAMS)
        lora.peft.save(f"{name}-peft", adapter)
    return tmp_path


def loaded(path: str) -> lora.Adapter:
    return lora.load(path) if Path(path, "_CHECKPOINT_METADATA").exists() else lora.peft.load(path, PARAMS, SITES)


@pytest.mark.parametrize("suffix", ["", "-peft"])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("", {}),
        ("--weights 0.5 -2", {"weights": (0.5, -2)}),
        ("--method svd --rank 3", {"method": "svd", "rank": 3}),
        ("--method ties_svd --density 0.4", {"method": "ties_svd", "density": 0.4}),
        ("--method knots --density 1 --majority-sign frequency", KNOTS),
    ],
)
def test_both_formats(suffix: str, options: str, settings: Any, folder: Path, capsys: Any) -> None:
    assert main(f"compose one{suffix} two{suffix} --out out {options}".split()) == 0
    said = capsys.readouterr().out
    assert "energy lost" in said and "out: 2 parameters, energy lost at most" in said
    desired = lora.compose([lora.load("one"), lora.load("two")], **settings)
    found = loaded("out")
    assert sorted(found) == sorted(desired)
    for path in found:
        assert found[path].rank == desired[path].rank
        assert_close(found[path].delta(), desired[path].delta())


def test_seeds(folder: Path) -> None:
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        line = f"compose one two --out {out} --method dare_linear --density 0.5 --seed {seed}"
        assert main(line.split()) == 0
    assert_same(lora.load("a"), lora.load("b"))
    assert not np.array_equal(lora.load("a")["layers_0/up/kernel"].a, lora.load("c")["layers_0/up/kernel"].a)


def test_the_base_is_kept_and_must_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compose", "one", "two", "--out", "out"]) == 0
    assert lora.load("out", PARAMS)
    with pytest.raises(lora.CheckpointError, match="another base"):
        lora.load("out", {**PARAMS, "more": jnp.ones(3)})
    lora.save("other", random_adapter(SITES), params={**PARAMS, "more": jnp.ones(3)})
    assert main(["compose", "one", "other", "--out", "elsewhere"]) == 2
    assert capsys.readouterr().err == "lora-jax: other was saved for another base than one\n"


@pytest.mark.parametrize("name", COMPOSABLE)
def test_everything_that_peft_stores(name: str, tmp_path: Path) -> None:
    """Half of an adapter and half of it again is the adapter: factors, magnitudes, biases, modules, rows."""
    files = read_peft(GOLDEN / name)
    made, report = compose_files([files, files], [0.5, 0.5])
    write_peft(tmp_path / "out", made)
    again = read_peft(tmp_path / "out")
    assert set(again.modules) == set(files.modules)
    assert len(report.adapter) == len(report.rows)
    for module, each in files.modules.items():
        other = again.modules[module]
        assert (other.kind, again.scale(module)) == (each.kind, 1.0)
        scale = files.scale(module)
        deltas = [factor * np.tensordot(_flat(given.b), given.a, 1) for factor, given in ((scale, each), (1, other))]
        assert_close(np.float32(deltas[1]), np.float32(deltas[0]))
        assert other.b.ndim == each.b.ndim
        assert set(other.arrays()) == set(each.arrays())
        if each.magnitude is not None:
            assert_close(other.magnitude, np.asarray(each.magnitude, np.float32))
        if each.b_bias is not None:
            assert_close(other.b_bias, np.float32(scale * each.b_bias))
    assert set(again.saved) == set(files.saved)
    for key, value in files.saved.items():
        assert_close(again.saved[key], np.asarray(value, np.float32))
    for field in ("bias", "use_dora", "modules_to_save", "target_modules", "lora_bias"):
        given = files.config.get(field)
        assert (again.config.get(field) or None) == ((sorted(given) if isinstance(given, list) else given) or None)


def base_of(name: str, path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint of the base of golden files, and its tensors."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    tensors = {key.removeprefix("base."): value for key, value in expected.items() if key.startswith("base.")}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path, tensors


@pytest.mark.parametrize("name", COMPOSABLE)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_with_the_base_a_weight_of_zero_is_the_base_and_one_the_adapter(
    name: str, weight: float, tmp_path: Path
) -> None:
    """Of everything that PEFT stores, merged into the base: the base, or what PEFT merges."""
    base, before = base_of(name, tmp_path / "base")
    line = [
        "compose",
        str(GOLDEN / name),
        "--out",
        str(tmp_path / "out"),
        "--base",
        str(base),
        "--weights",
        str(weight),
    ]
    assert main(line) == 0
    lora.peft.merge_checkpoint(base, tmp_path / "out", tmp_path / "merged")
    expected = load_file(GOLDEN / name / "expected.safetensors")
    desired = {key: expected[f"merged.{key}"] for key in before} if weight else before
    assert_close(load_file(tmp_path / "merged" / "model.safetensors"), desired)


def test_differences_to_the_base_add_up(tmp_path: Path) -> None:
    """Twice and a half of what whole tensors, rows and magnitudes change."""
    for name in ("saved", "tokens", "dora", "dora_conv2", "dora_conv1d_hf"):
        base, before = base_of(name, tmp_path / f"{name}-base")
        files = read_peft(GOLDEN / name)
        made, _ = compose_files([files, files], [2.0, 0.5], base_values(open_checkpoint(base), [files]))
        for key, value in full_tensors(files.saved).items():
            assert_close(made.saved[key], before[key] + 2.5 * (np.asarray(value, np.float32) - before[key]))
        for table, rows in token_rows(files.saved).items():
            numbers = made.config["trainable_token_indices"][table]
            old = before[f"{table}.weight"][numbers]
            assert_close(made.saved[table + TOKEN_ROWS], old + 2.5 * (rows - old))
        for module, each in files.modules.items():
            if each.magnitude is None:
                continue
            weight = before[f"{module}.weight"].astype(np.float64)
            last = len(weight) != each.magnitude.size
            norm = np.sqrt(np.square(weight.T if last else weight.reshape(len(weight), -1)).sum(1))
            norm = norm.reshape(each.magnitude.shape)
            assert_close(made.modules[module].magnitude, np.float32(norm + 2.5 * (each.magnitude - norm)))


def test_a_base_that_is_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tensors = base_of("saved", tmp_path / "base")
    line = ["compose", str(GOLDEN / "saved"), "--out", str(tmp_path / "out"), "--base", str(base)]
    for state in ({"other.weight": np.ones(3, np.float32)}, {key: value[:1] for key, value in tensors.items()}):
        save_file(state, base / "model.safetensors")
        assert main(line) == 2
        assert "belongs to another base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _flat(b: np.ndarray) -> np.ndarray:
    return b.reshape(len(b), -1)


def test_rows_of_different_tokens_are_united(tmp_path: Path) -> None:
    def tokens(numbers: list[int], value: float) -> PeftFiles:
        rows = {"wte.token_adapter.trainable_tokens_delta": np.full((len(numbers), 3), value, np.float32)}
        return PeftFiles({"trainable_token_indices": {"wte": numbers}}, {}, rows)

    made, _ = compose_files([tokens([7, 2], 1.0), tokens([5], 2.0)])
    assert made.config["trainable_token_indices"] == {"wte": [2, 5, 7]}
    assert made.saved["wte.token_adapter.trainable_tokens_delta"][:, 0].tolist() == [1.0, 2.0, 1.0]


def test_targets_that_a_regex_chose_become_names(tmp_path: Path) -> None:
    module = Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
    files = PeftFiles({"r": 2, "lora_alpha": 2, "target_modules": r".*\.q"}, {"layers.0.q": module})
    made, _ = compose_files([files, files])
    assert made.config["target_modules"] == ["layers.0.q"]


def test_uniform_has_one_rank_and_one_scale(folder: Path) -> None:
    assert main(["compose", "one-peft", "two-peft", "--out", "plain", "--weights", "1", "-0.5"]) == 0
    assert main(["compose", "one-peft", "two-peft", "--out", "both", "--weights", "1", "-0.5", "--uniform"]) == 0
    assert_close(lora.merge(PARAMS, loaded("both")), lora.merge(PARAMS, loaded("plain")))
    config = read_peft("both").config
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (5, {}, {})


REFUSED = {
    "compose --out out": "There is nothing to compose",
    "compose one two": "Missing from lora-jax compose: --out",
    "compose one nowhere --out out": "There is nothing at nowhere",
    "compose one two-peft --out out": "Adapters of different formats: one (orbax), two-peft (peft)",
    "compose one two --out one": "one exists already",
    "compose one two --out out --weights 1": "1 weights were given for 2 adapters",
    "compose one two --out out --method sum": "method='sum' is not a method of composition; choose one of: block",
    "compose one two --out out --method ties": "method='ties' keeps a share of the entries",
    "compose one two --out out --method svd --rank 0": "rank=0 must be a positive integer",
    "compose one two --out out --method block --rank 2": "layers_0/down/kernel: method='block' keeps whole adapters",
    "compose one two --out out --seed -1": "--seed must be at least 0",
    "compose one two --out out --density 0.5": "density=0.5 means nothing",
    "compose one two --out out --method svd --majority-sign total": "elects no signs",
    "compose tokens tokens --out out": "Here --base takes one, for PEFT adapters",
    "compose one two --out out --uniform": "--uniform is for PEFT's format",
    "compose one two --out out --base hf": "--base goes with PEFT's format",
    "compose one-peft two-peft --out out --base nowhere": "nowhere is not a directory with a base model",
    "compose dora one-peft --out out": "layers.0.up is DoRA in one adapter and not in another",
    "compose experts experts --out out": "lora-jax convert",
    "compose adalora adalora --out out": "is AdaLoRA, no plain LoRA",
    "compose activated activated --out out": "is aLoRA: adapters that act on different tokens",
    "compose tied tied --out out": "ensure_weight_tying stores the factors of a table twice",
    "compose transposed one-peft --out out": "fan_in_fan_out differs",
}


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_are_one_line_and_write_nothing(args: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tokens", "experts", "adalora"):
        if name in args:
            (folder / name).symlink_to(GOLDEN / name)
    up = Module("linear", np.ones((2, 5), np.float32), np.ones((6, 2), np.float32), np.ones(6, np.float32))
    config = {"r": 2, "target_modules": ["up"]}
    write_peft("dora", PeftFiles({**config, "use_dora": True}, {"layers.0.up": up}))
    plain = {"layers.0.up": Module("linear", up.a, up.b)}
    write_peft("activated", PeftFiles({**config, "alora_invocation_tokens": [1]}, plain))
    write_peft("tied", PeftFiles({**config, "ensure_weight_tying": True}, plain))
    write_peft("transposed", PeftFiles({**config, "fan_in_fan_out": True}, plain))
    before = sorted(folder.rglob("*"))
    assert main(args.split()) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("lora-jax: ") and complaint.count("\n") == 1
    assert REFUSED[args] in complaint
    assert sorted(folder.rglob("*")) == before


def test_convolutions_in_groups_are_refused() -> None:
    module = Module("conv", np.ones((4, 3, 2, 2), np.float32), np.ones((6, 2, 1, 1), np.float32))
    with pytest.raises(lora.CheckpointError, match=r"c is a convolution in groups.*lora-jax convert"):
        compose_files([PeftFiles({"r": 4}, {"c": module})])


def test_integers_are_refused() -> None:
    counter = PeftFiles({"modules_to_save": ["norm"]}, {}, {"norm.steps": np.ones((), np.int64)})
    with pytest.raises(lora.CheckpointError, match=r"norm.steps is int64, and integers cannot be composed"):
        compose_files([counter])


def test_config_of_the_composition(folder: Path) -> None:
    files = read_peft("one-peft")
    settings = {"base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM", "use_rslora": True}
    write_peft("named", PeftFiles({**files.config, **settings}, files.modules))
    assert main(["compose", "two-peft", "named", "--out", "out"]) == 0
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == ("some/base", "CAUSAL_LM", 5)
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 5)
    root = [lora.peft.load(name, PARAMS, SITES) for name in ("two-peft", "named")]
    desired = lora.compose(root)
    for path, update in lora.peft.load("out", PARAMS, SITES).items():
        assert_close(update.delta(), desired[path].delta())
    assert len(load_file("out/adapter_model.safetensors")) == 4


def test_tables_that_are_the_bases_are_kept_and_add_nothing(tmp_path: Path) -> None:
    """PEFT writes the base's table beside its factors."""
    table = np.arange(36, dtype=np.float32).reshape(9, 4)
    ones = Module("embedding", np.ones((2, 9), np.float32), np.ones((4, 2), np.float32))
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    files = [PeftFiles(config, {"embed_tokens": ones}, {"embed_tokens.weight": table}) for _ in range(2)]
    without = PeftFiles(config, {"embed_tokens": ones})
    (tmp_path / "base").mkdir()
    save_file({"embed_tokens.weight": table}, tmp_path / "base" / "model.safetensors")
    for given in (files, [files[0], without]):
        for base in (None, base_values(open_checkpoint(tmp_path / "base"), given)):
            made, _ = compose_files(given, [0.5, 2], base)
            assert_same(made.saved, {"embed_tokens.weight": table})
            assert_close(made.delta("embed_tokens", (9, 4)), 2.5 * files[0].delta("embed_tokens", (9, 4)))
    other = PeftFiles(config, {"embed_tokens": ones}, {"embed_tokens.weight": table + 1})
    with pytest.raises(lora.LoraError, match=r"embed_tokens\.weight"):
        compose_files([files[0], other], [0.5, 2])
