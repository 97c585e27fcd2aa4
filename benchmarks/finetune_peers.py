"""Fine-tuning tokens per second and peak memory: a Qwen 2 here, in PyTorch with PEFT, in Tunix and in KerasHub.

Run from the root of the repository, with what is to be compared installed: `python -m benchmarks.finetune_peers`.
PyTorch runs its own model under PEFT; those of Tunix and KerasHub are adapted by `lora_jax`. All train on every token.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from benchmarks.harness import CLOCKS, Tables, machine, ratio, rounds

os.environ.setdefault("KERAS_BACKEND", "jax")


class Setting(NamedTuple):
    """A model, a batch and a rank."""

    layers: int = 4
    width: int = 512
    hidden: int = 1408
    heads: int = 8
    groups: int = 2
    vocabulary: int = 8192
    batch: int = 4
    length: int = 256
    rank: int = 8

    def tokens(self) -> np.ndarray:
        """A batch of random tokens."""
        return np.random.default_rng(0).integers(self.vocabulary, size=(self.batch, self.length))

    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        return {
            "model_type": "qwen2", "vocab_size": self.vocabulary, "hidden_size": self.width,
            "intermediate_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, "max_position_embeddings": 2048,
        }  # fmt: skip


Run = Callable[[], Any]


def ours(setting: Setting) -> Run:
    """The decoder of `lora_jax.models`."""
    from lora_jax import models

    model = models.initial(setting.config())
    return stepper(model.apply, model.params, setting)


def stepper(fn: Callable[..., Any], params: Any, setting: Setting) -> Run:
    """A compiled step of AdamW on the adapter of a JAX model, `fn(params, tokens) -> logits`."""
    tokens = jnp.asarray(setting.tokens(), jnp.int32)
    sites = lora.find_sites(fn, params, tokens)
    chosen = tuple(path for path, site in sites.items() if not site.head and site.kind != "embedding")
    adapter = lora.init(jax.random.key(1), lora.LoraConfig(rank=setting.rank, targets=chosen), params, sites)
    assert len(adapter) in (7, 7 * setting.layers), sorted(adapter)
    adapted, tx = lora.adapt(fn), lora.optimizer(optax.adamw(1e-4), adapter)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Any, state: Any, params: Any, tokens: Any) -> Any:
        def loss(adapter: Any) -> Any:
            logits = adapted(params, adapter, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    held = [adapter, tx.init(adapter)]

    def run() -> Any:
        *held[:], value = step(*held, params, tokens)
        return value

    return run


def torch_peft(setting: Setting) -> Run:
    """Transformers' own model under PEFT, with as many threads as PyTorch takes."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{key: value for key, value in setting.config().items() if key != "model_type"})
    model = transformers.Qwen2ForCausalLM(config)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear")
    )
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer, tokens = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4), torch.from_numpy(setting.tokens())

    def run() -> float:
        logits = wrapped(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def tunix(setting: Setting) -> Run:
    """Tunix's model, adapted as it is."""
    from flax import nnx
    from tunix.models.qwen2 import model as code

    config = code.ModelConfig(
        num_layers=setting.layers, vocab_size=setting.vocabulary, embed_dim=setting.width, hidden_dim=setting.hidden,
        num_heads=setting.heads, head_dim=setting.width // setting.heads, num_kv_heads=setting.groups, rope_theta=10000,
        norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    fn, params = lora.nnx.functional(code.Qwen2(config, rngs=nnx.Rngs(params=0)))
    positions = jnp.tile(jnp.arange(setting.length), (setting.batch, 1))
    mask = jnp.tile(jnp.tri(setting.length, dtype=bool), (setting.batch, 1, 1))
    return stepper(lambda params, tokens: fn(params, tokens, positions, None, mask)[0], params, setting)


def keras_hub(setting: Setting) -> Run:
    """KerasHub's model, adapted as it is."""
    import keras_hub

    backbone = keras_hub.models.QwenBackbone(
        vocabulary_size=setting.vocabulary, num_layers=setting.layers, num_query_heads=setting.heads,
        num_key_value_heads=setting.groups, hidden_dim=setting.width, intermediate_dim=setting.hidden,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = keras_hub.models.QwenCausalLM(backbone, preprocessor=None)
    paths = [variable.path for variable in model.trainable_variables]
    rest = [variable.value for variable in model.non_trainable_variables]
    mask = jnp.ones((setting.batch, setting.length), jnp.int32)

    def fn(params: Any, tokens: Any) -> Any:
        inputs = {"token_ids": tokens, "padding_mask": mask}
        return model.stateless_call([params[path] for path in paths], rest, inputs, training=False)[0]

    return stepper(fn, {variable.path: variable.value for variable in model.trainable_variables}, setting)


RUNS: dict[str, tuple[str, Callable[[Setting], Run]]] = {
    "lora_jax": ("lora_jax", ours),
    "torch, transformers, PEFT": ("peft", torch_peft),
    "Tunix's model": ("tunix", tunix),
    "KerasHub's model": ("keras_hub", keras_hub),
}
"""By name, the package that it needs and what makes a step."""


def peak(name: str, steps: int) -> str:
    """Largest resident memory of a process that takes some steps."""
    command = [sys.executable, "-m", "benchmarks.finetune_peers", "--alone", name, "--rounds", str(steps)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--alone", choices=sorted(RUNS), help="only this one, and print the memory of the process")
    given = parser.parse_args()
    setting = Setting()
    if given.alone:
        run = RUNS[given.alone][1](setting)
        for _ in range(given.rounds):
            jax.block_until_ready(run())
        print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f}")
        return
    load, there = os.getloadavg()[0], {name: make for name, (package, make) in RUNS.items() if find_spec(package)}
    peaks = {name: peak(name, 3) for name in there}  # first: on Linux a process begins with the peak of its parent
    times = rounds({name: make(setting) for name, make in there.items()}, given.rounds, clock=given.clock)
    count, rows = setting.batch * setting.length, []
    for name, each in times.items():
        share, low, high = ratio(times, name, "lora_jax")
        speed = f"{count / median(each):,.0f}"
        rows.append([name, speed, f"{share:.2f} ({low:.2f} to {high:.2f})", f"{peaks[name]} MB"])
    report = Tables(machine())
    title = (
        f"{setting.layers} layers, width {setting.width}, batch {setting.batch} × {setting.length}, rank {setting.rank}"
    )
    title += f", {given.rounds} rounds, {given.clock} clock, load {load:.1f} before"
    report.add(title, ["", "tokens/s", "time / lora_jax (quartiles)", "peak memory"], rows)
    print(report.markdown()) if given.markdown else report.print()


if __name__ == "__main__":
    main()
