"""What every verb of `lora-jax` keeps to on a terminal, in a pipe and with --json: each rule over all verbs."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import ENOSPC
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.adapter.site import Site
from lora_jax.adapter.updates import LowRank
from lora_jax.cli import main
from lora_jax.cli.parse import VERBS, _options
from lora_jax.errors import CheckpointError, StorageError
from lora_jax.io.peft import Module, PeftFiles, write_peft
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.loop import TrainingError

GOLDEN = Path(__file__).parents[1] / "golden"
BOXES = re.compile("[\u2500-\u257f]")
LONG = "model.language_model.layers.{}.self_attn.q_proj"

# Lines of arguments in a folder that `folder` fills, and a key of what --json prints. Fine-tuning takes long, and is
# run with --json in tests/train.
RUNS = {
    "inspect": ("inspect long", "entries"),
    "inspect own": ("inspect own", "entries"),
    "inspect against": ("inspect long --against other", "overlap"),
    "compose": ("compose long other --out composed --method svd", "rows"),
    "convert": ("convert own converted", "entries"),
    "merge": ("merge base golden merged", "changed"),
    "bench": ("bench --shapes 8x6 --ranks 2 --tokens 2 --adapters 2 --rounds 1", "rows"),
}
TABLES = [name for name in RUNS if name != "merge"]
EVERY_VERB = pytest.mark.parametrize("verb", VERBS)


class Tty(io.StringIO):
    """A terminal that keeps what it is shown."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terminal")
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    for name in ("long", "other"):
        modules = {LONG.format(i): Module("linear", array(2, 6), array(5, 2)) for i in (3, 11)}
        write_peft(path / name, PeftFiles(config, modules))
    sites = [Site(path=f"model/decoder/layers_{i}/attention/query/kernel", shape=(6, 5), dtype="float32", kind="dense",
                  in_axes=(0,), out_axes=(1,)) for i in range(2)]  # fmt: skip
    updates = {site.path: LowRank(*map(jnp.asarray, (array(2, 6), array(2, 5), np.float32(2))), site) for site in sites}
    lora.save(path / "own", lora.Adapter(updates))
    (path / "base").mkdir()
    kept = {
        name: value
        for name, value in load_file(GOLDEN / "linear" / "expected.safetensors").items()
        if name[:5] == "base."
    }
    save_file({name[5:]: value for name, value in kept.items()}, path / "base" / "model.safetensors")
    (path / "golden").symlink_to(GOLDEN / "linear")
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with adapters and a base to read."""
    for source in made.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def on_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(args: str, width: int = 80, **environment: str) -> str:
        shown = Tty()
        monkeypatch.setenv("COLUMNS", str(width))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", shown)
            assert main(args.split()) == 0
        return shown.getvalue()

    return run


def columns(line: str) -> int:
    return len(re.sub(r"\x1b\[[\d;]*m", "", line))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("name", ["inspect", "inspect own", "inspect against", "compose"])
def test_tables_fit_the_terminal(name: str, width: int, on_terminal: Callable[..., str]) -> None:
    shown = on_terminal(RUNS[name][0], width)
    shown = re.sub("^composed: .*", "", shown, flags=re.MULTILINE)  # A line, which the terminal wraps.
    assert max(map(columns, shown.splitlines())) <= width
    words = re.sub(r"\x1b\[[\d;]*m", "", BOXES.sub(" ", shown)).splitlines()
    assert not [line for line in words if len(line.split()) == 1 and len(line.strip()) == 1], "one letter a line"
    paths = [line for line in words if "q_proj" in line or "kernel" in line]
    assert len(paths) >= 1
    if not name.startswith("inspect against"):
        assert len({line.split()[0] for line in paths}) == len(paths), "folded paths stay different"


def test_bench_fits_the_terminal(on_terminal: Callable[..., str]) -> None:
    table = on_terminal(RUNS["bench"][0], 60).split("\n", 3)[-1]
    assert max(map(columns, table.splitlines())) <= 60


def test_a_real_terminal(folder: Path) -> None:
    """The kernel's: its width is asked for, not taken from the environment."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", "import os, sys, termios; termios.tcsetwinsize(1, (24, 66)); "
               "from lora_jax.cli import main; sys.exit(main(['inspect', 'long']))"]  # fmt: skip
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        shown = b""
        while part := _read(ours):
            shown += part
    os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().replace("\r", "").splitlines()
    assert 40 < max(map(columns, lines)) <= 66 and b"q_proj" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when nobody writes any more.
        return b""


@pytest.mark.parametrize("name", RUNS)
def test_in_a_pipe_nothing_is_wrapped_drawn_or_coloured(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(RUNS[name][0].split()) == 0
    said, progress = capsys.readouterr()
    assert "\x1b" not in said + progress and not BOXES.search(said + progress)
    if name in ("inspect", "inspect own", "convert"):
        header, *rows = said.split("\n\n")[0].splitlines()
        assert [len(re.split(" {2,}", row)) for row in rows] == [len(re.split(" {2,}", header))] * 2
        path = LONG.format(3) if name == "inspect" else ""
        assert any(row.startswith(path) for row in rows)


@pytest.mark.parametrize("name", RUNS)
def test_json_is_all_that_is_printed(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, key = RUNS[name]
    assert main([*args.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found[key]


def test_json_has_whole_paths_and_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "long", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found["entries"]] == [LONG.format(11), LONG.format(3)]
    assert (found["format"], found["entries"][0]["rank"], found["entries"][0]["shape"]) == ("peft", 2, [5, 6])


@pytest.mark.parametrize(
    ("environment", "escapes"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
@pytest.mark.parametrize("name", ["inspect", "compose"])
def test_no_color_and_dumb_terminals(
    name: str, environment: dict[str, str], escapes: bool, on_terminal: Callable[..., str]
) -> None:
    assert ("\x1b[" in on_terminal(RUNS[name][0], 200, **environment)) == escapes


HOSTILE = "a\x1b[31m[/b][bold]\u202e\x9b\rq_proj"


@pytest.mark.parametrize("terminal", [True, False])
def test_control_bytes_and_markup_are_spelled_out(
    terminal: bool, on_terminal: Callable[..., str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Module("linear", np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    write_peft(
        folder / "x[bold]\x1b[31m", PeftFiles({"r": 2, "lora_alpha": 4, "target_modules": ["q"]}, {HOSTILE: module})
    )
    for args in ("inspect x[bold]\x1b[31m", "compose x[bold]\x1b[31m --out a[/b]"):
        if terminal:
            shown = on_terminal(args, 200, NO_COLOR="1")
        else:
            assert main(args.split(" ")) == 0
            shown = capsys.readouterr().out
        assert not set("\x1b\x9b\u202e\r") & set(shown)
        assert r"a\x1b[31m[/b][bold]\u202e\x9b\rq_proj" in shown
    assert "a[/b]: 1 parameters" in shown
    assert main(["inspect", "no\x1b[31m"]) == 2
    assert r"no\x1b[31m" in capsys.readouterr().err


def test_text_that_a_model_wrote_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().quote("sample", "two\nlines\x1b]0;title\x07")
    assert capsys.readouterr().out == "sample:\n  two\n  lines\\x1b]0;title\\x07\n"


def test_a_terminal_that_is_not_utf8(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["inspect", "long"]) == 0
    assert b"|\\u0394W|" in written.getvalue()


# ---- exit codes


def given(verb: str) -> list[str]:
    """Arguments that can be parsed."""
    return [
        verb,
        *{
            "merge": ["a", "b", "c"], "compose": ["a", "--out", "b"], "convert": ["a", "b"], "inspect": ["a"],
            "quantise": ["a", "b"], "export": ["a", "b", "--for", "vllm"],
            "extract": ["a", "b", "c"], "generate": ["--model", "a", "--prompt", "b"], "chat": ["--model", "a"],
            "evaluate": ["--model", "a", "--data", "b"],
        }.get(verb, []),
    ]  # fmt: skip


@EVERY_VERB
@pytest.mark.parametrize(
    ("happens", "code", "said"),
    [
        (None, 0, ""),
        (OSError(ENOSPC, "No space left on device"), 1, "No space left"),
        (TrainingError("the loss is nan at step 4"), 1, "the loss is nan"),
        (MemoryError(), 1, "MemoryError"),
        (ImportError("drawing needs matplotlib"), 1, "matplotlib"),
        (StorageError("a cannot be written"), 1, "a cannot be written"),
        (CheckpointError("two\nlines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "x\x1b"), 2, r"x\x1b: No such file"),
        (PermissionError(13, "Permission denied", "y"), 2, "y: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped; nothing was left behind"),
        (signal.SIGTERM, 143, "stopped; nothing was left behind"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("stage", ["prepare", "run"])
def test_exit_codes(
    verb: str, happens: Any, code: int, said: str, stage: str,
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def happen(*_: Any) -> Any:
        if isinstance(happens, BaseException):
            raise happens
        if happens is not None:
            signal.raise_signal(happens)
        return Job()

    class Job:
        resume = None
        run = happen

    kind = getattr(import_module(f"lora_jax.cli.{verb}"), verb.title())
    monkeypatch.setattr(kind, "prepare", happen if stage == "prepare" else lambda self, saved: Job())
    kept = os.dup(1)
    try:
        assert main(given(verb)) == code
    finally:
        os.dup2(kept, 1)
    complaint = capfd.readouterr().err
    assert said in complaint and complaint.count("\n") == (1 if said else 0)
    assert not said or complaint.startswith("lora-jax: ")


BAD = {
    "finetune": ["--rank x", "--rank", "--rank 0", "--alpha nan", "--model huge", "--data /nope", "--data .",
                 "--out long/adapter_config.json", "--resume", "--targets nothing", "--method what", "--init kaiming",
                 "--steps 0", "a"],
    "generate": ["", "--model base", "--prompt a", "--model nope --prompt a", "--model base --prompt a --top-k x",
                 "--model base --prompt a --temperature -1", "--model broken --prompt a", "--model base --file nope"],
    "chat": ["", "--model nope", "--model base --json", "--model base --top-p 0", "--model base --max-tokens 0"],
    "evaluate": ["", "--model base", "--data nope --model base", "--data base --model base"],
    "quantise": ["", "a", "nope out", "base out", "base golden"],
    "merge": ["", "a", "a b c", "base golden base", "base nope out", "base own out", "base golden out --weights x",
              "base golden out --weights 1 2", "base golden out --rounding up", "base long out", "golden golden out"],
    "compose": ["", "long", "long --out other", "nope --out out", "long own --out out",
                "long other --out out --method x", "long other --out out --weights 1",
                "long golden --out out --density 2 --method ties", "base --out out",
                "long --out out --base nope"],
    "convert": ["", "own", "nope out", "long out", "own other", "own out --like own", "own out --names x",
                "long out --like long", "long out --like own", "long out --like own --task-type X"],
    "inspect": ["", "a b", "nope", "base", "/dev/null", "broken", "torn", "long --plot x.jpg", "long --plot no/x.png",
                "long --against nope", "long --against own"],
    "bench": ["--shapes 3", "--shapes x", "--shapes 0x3", "--ranks 0", "--ranks", "--ranks 9 --shapes 4x4",
              "--rounds 0", "--tokens 3 --length 2", "--dtype int8", "--out long", "--model huge", "--seed -1"],
}  # fmt: skip


@pytest.mark.parametrize(("verb", "args"), [(verb, args) for verb, lines in BAD.items() for args in lines])
def test_bad_input_is_one_line_and_exit_code_2(
    verb: str, args: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    (folder / "torn").mkdir()
    (folder / "torn" / "_CHECKPOINT_METADATA").write_text("\xff{")
    before = sorted(folder.rglob("*"))
    assert main([verb, *args.split()]) == 2
    said, complaint = capsys.readouterr()
    assert said == "" and complaint.startswith("lora-jax: ") and complaint.count("\n") == 1
    assert "Traceback" not in complaint and sorted(folder.rglob("*")) == before


# ---- did you mean


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        *[(f"finetune {each}", "--rank") for each in ("--r 4", "--r=4", "-r 4", "--lora-r 4", "--lora_r=4", "--R 4")],
        *[(f"finetune {option}", "--alpha") for option in ("--lora_alpha 4", "--lora-alpha 4", "--alhpa 4")],
        ("finetune --lora_dropout 0.1", "--dropout"),
        ("finetune --target_modules q_proj", "--targets"),
        ("finetune --num-layers 4", "--targets"),
        ("finetune --adapter-path x", "--out"),
        ("finetune --iters 4", "--steps"),
        ("finetune --use-dora", "--method dora"),
        ("finetune --fine-tune-type dora", "--method"),
        ("finetune --max_seq_length 4", "--length"),
        ("finetune --output_dir x", "--out"),
        ("compose a b --out c --combination_type svd", "--method"),
        ("compose a b --out c --svd_rank 4", "--rank"),
        ("compose a b --output c", "--out"),
        ("bench --lora-r 4", "--ranks"),
        ("bench --lora-rank 4", "--ranks"),
        ("inspect --adapter-path x", "lora-jax inspect ADAPTER"),
        ("merge --model x --adapter-path y --save-path z", "lora-jax merge BASE ADAPTER [ADAPTER ...] OUT"),
        ("convert a --out b", "lora-jax convert ADAPTER OUT"),
        ("fuse --model x", "merge"),
        ("lora", "finetune"),
        ("train", "finetune"),
        ("comopse", "compose"),
        ("add_weighted_adapter", "compose"),
    ],
)  # fmt: skip
def test_did_you_mean(args: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args.split()) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and re.search(rf"(did you mean |: ){re.escape(meant)}(\?|$)", complaint.strip())


@pytest.mark.parametrize(
    ("args", "said"), [([], "finetune, generate"), (["--json"], "after a verb"), (["nothing"], "there are")]
)
def test_without_a_verb(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert said in capsys.readouterr().err


# ---- help, the version, progress


def test_help_and_version_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-jax {version('lora_jax')}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    for part in ("0 done", "1 something failed", "2 what you gave", "130", "143", "--json", "NO_COLOR"):
        assert part in " ".join(shown.split())


@EVERY_VERB
@pytest.mark.parametrize("width", [60, 200])
def test_help_of_a_verb(verb: str, width: int, on_terminal: Callable[..., str]) -> None:
    shown = on_terminal(f"{verb} --help", width)
    kind = getattr(import_module(f"lora_jax.cli.{verb}"), verb.title())
    assert all(f"--{option}" in shown for option in _options(kind))
    assert shown.startswith(f"usage: lora-jax {VERBS[verb][0]}") or width == 60
    assert "Exit codes: 0 done" in shown and "None" not in re.sub("None (is|makes)", "", shown)
    assert "\x1b" not in shown and not BOXES.search(shown) and max(map(len, shown.splitlines())) <= width


@EVERY_VERB
def test_the_list_of_verbs_says_what_their_help_says(verb: str) -> None:
    kind = getattr(import_module(f"lora_jax.cli.{verb}"), verb.title())
    assert (kind.__doc__ or "").splitlines()[0] == VERBS[verb][1]


def test_help_is_quick() -> None:
    code = (
        "import sys, time; from lora_jax.cli import main; code = main(['--help']); "
        "heavy = {'jax', 'rich', 'numpy', 'matplotlib', 'orbax'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy} {time.process_time()}' if code or heavy or time.process_time() > 0.6 else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("stream", "term", "bar"), [(Tty, "xterm", True), (Tty, "dumb", False), (io.StringIO, "xterm", False)]
)
def test_a_bar_on_terminals_only(
    stream: type[io.StringIO], term: str, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("reading [b]", 2).shown() as progress:
        progress.update(1, "now\x1b[2J")
        progress.update(2, "")
    assert ("\x1b[" in shown.getvalue()) == bar and "\x1b[2J" not in shown.getvalue()
    assert "reading [b]" in shown.getvalue()
    assert bar or "reading [b]: step 2/2" in shown.getvalue()


def test_json_keeps_control_bytes_from_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\x1b[2J\x9b31m\x7f\u202e\U000e0001 Grüße 🎉\n"
    Terminal(as_json=True).result({"sample": text})
    said = capsys.readouterr().out
    assert json.loads(said) == {"sample": text} and "Grüße 🎉" in said
    assert all(each.isprintable() or each == "\n" for each in said)
