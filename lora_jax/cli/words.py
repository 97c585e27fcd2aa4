"""Options and verbs of PEFT and mlx-lm by their names here, for "did you mean"."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches

VERBS = {
    "train": "finetune", "fine-tune": "finetune", "tune": "finetune", "lora": "finetune", "sft": "finetune",
    "fuse": "merge", "merge-and-unload": "merge",
    "add-weighted-adapter": "compose", "combine": "compose", "mix": "compose",
    "save": "convert", "serve": "export", "deploy": "export", "show": "inspect", "info": "inspect", "print": "inspect",
    "complete": "generate", "infer": "generate", "inference": "generate", "sample": "generate", "talk": "chat",
    "eval": "evaluate", "test": "evaluate", "perplexity": "evaluate", "score": "evaluate",
    "benchmark": "bench", "perf": "bench", "speed": "bench",
}  # fmt: skip

OPTIONS = {
    # PEFT's LoraConfig and the scripts around it.
    "r": "rank", "lora-r": "rank", "lora-rank": "rank", "lora-dim": "rank", "new-rank": "rank", "svd-rank": "rank",
    "lora-alpha": "alpha", "scale": "alpha", "lora-scale": "alpha",
    "lora-dropout": "dropout",
    "target-modules": "targets", "lora-target": "targets", "lora-target-modules": "targets", "modules": "targets",
    "use-rslora": "rslora", "use-dora": "method dora", "peft-type": "method", "init-lora-weights": "init",
    "combination-type": "method", "majority-sign-method": "majority-sign",
    "base-model-name-or-path": "base-model", "model-name-or-path": "model",
    "output-dir": "out", "output": "out", "save-dir": "out",
    "dataset": "data", "train-file": "data",
    "learning-rate": "lr", "peak-lr": "lr", "max-steps": "steps", "num-steps": "steps",
    "num-train-epochs": "steps", "epochs": "steps",
    "per-device-train-batch-size": "batch", "train-batch-size": "batch", "batch-size": "batch", "bs": "batch",
    "max-length": "length", "max-seq-len": "length", "seq-len": "length", "sequence-length": "length",
    "warmup-steps": "warmup", "gradient-accumulation-steps": "accumulate", "grad-accumulation-steps": "accumulate",
    "lr-scheduler-type": "schedule", "lr-schedule": "schedule", "optim": "optimizer", "max-grad-norm": "clip",
    "early-stopping-patience": "patience",
    "eval-steps": "eval-every", "save-steps": "checkpoint-every", "gradient-checkpointing": "remat",
    "resume-from-checkpoint": "resume", "overwrite-output-dir": "overwrite", "force": "overwrite",
    "max-new-tokens": "max-tokens", "n-predict": "max-tokens", "num-predict": "max-tokens", "temp": "temperature",
    "stop-strings": "stop", "prompt-file": "file", "system-prompt": "system", "base": "model",
    "per-device-eval-batch-size": "batch", "merged-model": "merged",
    # mlx-lm's lora and fuse.
    "iters": "steps", "max-seq-length": "length", "fine-tune-type": "method", "keys": "targets",
    "num-layers": "targets", "lora-layers": "targets", "steps-per-eval": "eval-every", "save-every": "checkpoint-every",
    "resume-adapter-file": "resume", "grad-checkpoint": "remat", "adapter-path": "out", "save-path": "out",
    "adapter-file": "out",
}  # fmt: skip

PLACES = {
    "out": "OUT", "save-path": "OUT", "output": "OUT", "output-dir": "OUT", "save-dir": "OUT",
    "adapter": "ADAPTER", "adapters": "ADAPTER", "adapter-path": "ADAPTER", "adapter-file": "ADAPTER",
    "lora": "ADAPTER", "model": "BASE", "base": "BASE", "base-model": "BASE",
}  # fmt: skip
"""What other tools take as an option, and a verb here by its place among the paths."""


def meant(given: str, options: Collection[str], usage: str) -> str:
    """What somebody may have meant by an option that there is not.

    Args:
      given: as typed, such as `--lora_r`.
      options: names of those that there are, without dashes.
      usage: how the verb is called, with its places in capitals.

    Example:
      >>> meant("--lora_r", ["rank", "alpha"], "finetune"), meant("--alhpa", ["rank", "alpha"], "finetune")
      ('did you mean --rank?', 'did you mean --alpha?')
      >>> meant("--adapter-path", ["plot"], "inspect ADAPTER")
      'ADAPTER is given without an option: lora-jax inspect ADAPTER'
    """
    name = given.lstrip("-").partition("=")[0].replace("_", "-").lower()
    known = OPTIONS.get(name, name)
    for each in (known, f"{known}s"):
        if each.split()[0] in options:
            return f"did you mean --{each}?"
    place = PLACES.get(name)
    if place and place in usage.replace("[", " ").split():
        return f"{place} is given without an option: lora-jax {usage}"
    if close := get_close_matches(name, list(options), n=2):
        return f"did you mean {' or '.join(f'--{each}' for each in close)}?"
    return f"there are {', '.join(f'--{each}' for each in sorted(options))}"


def meant_verb(given: str, verbs: Mapping[str, object]) -> str:
    """What somebody may have meant by a verb that there is not.

    >>> meant_verb("fuse", {"merge": None}), meant_verb("comopse", {"compose": None})
    ('did you mean merge?', 'did you mean compose?')
    """
    name = given.replace("_", "-").lower()
    close = [VERBS[name]] if name in VERBS else get_close_matches(name, list(verbs), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(verbs)}"
