"""The job behind `lora-jax finetune`: pre-train, freeze, adapt, evaluate, save, load, merge, verify, sample."""

import re
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.errors import LoraError
from lora_jax.models import Transformer, TransformerConfig, generate
from lora_jax.report.terminal import Progress, Terminal
from lora_jax.train.data import Bytes, Corpus, windows
from lora_jax.train.finetune import EVALUATED, finetune
from lora_jax.train.folder import Folder
from lora_jax.train.loop import TrainingError
from lora_jax.train.metrics import evaluate, losses_table, plot_loss
from lora_jax.train.options import TrainingOptions
from lora_jax.train.pretrain import Recipe, cache_path, load_cached, pretrain, store
from lora_jax.train.stop import deferred

_PROMPT, _SAMPLE, _TEMPERATURE = 48, 200, 0.7
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done.

    Attributes:
      shape: the base model.
      recipe: how it is pre-trained.
      config: the adapter.
      training: how it is trained.
      source: the text the base is pre-trained on.
      target: the text it is adapted to.
      record: all this as JSON, for people and for resuming.
    """

    shape: TransformerConfig
    recipe: Recipe
    config: lora.LoraConfig
    training: TrainingOptions
    source: Corpus
    target: Corpus
    record: dict[str, Any]


class FinetuneJob:
    """Fine-tuning, with everything checked and nothing written until `run` is called.

    Args:
      plan: what to do.
      folder: where to.
      resumed: whether `folder` holds the beginning of this run.
      overwrite: whether it may hold another run, which is replaced.
      resume: the arguments that continue it.
      terminal: where it tells what happens.

    Raises:
      MatchError: the adapter's config selects nothing.
    """

    def __init__(self, plan: Plan, folder: Folder, *, resumed: bool, overwrite: bool, resume: str, terminal: Terminal):
        self.resume = resume
        self._plan, self._folder, self._resumed, self._overwrite = plan, folder, resumed, overwrite
        self._terminal = terminal
        self._result: dict[str, Any] = {"out": folder.path}
        self._model = Transformer(plan.shape)
        self._plain, self._adapted = jax.jit(self._model.apply), jax.jit(lora.adapt(self._model.apply))
        tokens = jax.ShapeDtypeStruct((1, plan.training.length), jnp.uint8)
        self._abstract = jax.eval_shape(self._model.init, jax.random.key(0), tokens)
        self._sites = lora.find_sites(self._model.apply, self._abstract, tokens)
        self._init_key, self._step_key = jax.random.split(jax.random.key(plan.training.seed))
        self._start = jax.jit(lambda key, base: lora.init(key, plan.config, base, self._sites))
        # What selects nothing is refused here, and so is an optimizer that there is not.
        adapter = jax.eval_shape(self._start, self._init_key, self._abstract)
        jax.eval_shape(plan.training.how.transformation(adapter).init, adapter)

    def run(self) -> None:
        """Do it all, and say what happens.

        Raises:
          FolderError: another run is going on in the folder, or has changed it since it was checked.
          Interrupted: Ctrl-C was pressed or SIGTERM came; the state is on disk.
          TrainingError: a loss is not finite, or the merged model is not the adapted one.
        """
        began = time.monotonic()
        with self._folder.claimed(resume=self._resumed, overwrite=self._overwrite):
            if self._resumed and self._folder.finished:
                self._folder.finish()
                self._terminal.say(f"The run in {self._folder.path} is finished: nothing is left to do.")
            else:
                self._run()
                self._result["seconds"] = time.monotonic() - began
                self._terminal.say(f"Done in {self._result['seconds']:.0f} s.")
        self._terminal.result(self._result)

    def _run(self) -> None:
        if not self._resumed:
            with deferred():
                self._folder.start(self._plan.record)
        base = self._base()
        adapter = self._finetune(base)
        self._compare(base, adapter)
        with deferred():
            self._save(base, adapter)
        self._sample(base, self._verify(base))
        with deferred():
            self._folder.finish()

    def _base(self) -> Any:
        plan, say = self._plan, self._terminal.say
        size = sum(leaf.size for leaf in jax.tree.leaves(self._abstract))
        self._title(f"Base model: {plan.shape.layers} layers of width {plan.shape.width}, {size:,} parameters")
        path = cache_path(self._model, plan.recipe, plan.source)
        if (cached := load_cached(path, self._abstract)) is not None:
            say(f"Pre-trained on {plan.source.name} by an earlier run; read from {path}")
            return cached
        say(f"Pre-training on {plan.source.name}: {plan.source.train.size:,} bytes")
        report, states = partial(Progress, "pre-training", plan.recipe.steps), self._folder.state / "pretrain"
        base = pretrain(self._model, self._sites, plan.source, plan.recipe, states, report, say)
        try:
            store(path, base)
            say(f"Kept for the next run in {path}")
        except LoraError as error:
            say(f"Not kept for the next run: {error}")
        return base

    def _finetune(self, base: Any) -> lora.Adapter:
        plan, folder = self._plan, self._folder
        fresh = self._start(self._init_key, base)
        self._title(f"Adapter: {plan.config.method} of rank {plan.config.rank}; the base stays frozen")
        summary = lora.summary(fresh, self._abstract)
        self._terminal.show(summary)
        self._result["adapter"] = summary.as_dict()
        self._title(f"Fine-tuning on {plan.target.name}: {plan.target.train.size:,} bytes")
        return finetune(
            self._adapted,
            base,
            fresh,
            plan.target,
            plan.training,
            self._step_key,
            folder.state / "finetune",
            folder.metrics,
            partial(Progress, "fine-tuning", plan.training.steps),
            self._terminal.say,
        )

    def _compare(self, base: Any, adapter: lora.Adapter) -> None:
        plain, adapted = partial(self._plain, base), partial(self._adapted, base, adapter)
        texts = {text.name: self._held_out(text) for text in (self._plan.source, self._plan.target)}
        losses = {name: (evaluate(plain, text), evaluate(adapted, text)) for name, text in texts.items()}
        self._title("Loss on held-out text")
        self._terminal.show(losses_table(losses))
        self._result["losses"] = {name: {"base": base, "adapted": adapted} for name, (base, adapted) in losses.items()}

    def _save(self, base: Any, adapter: lora.Adapter) -> None:
        plan, folder = self._plan, self._folder
        lora.save(folder.adapter, adapter, config=plan.config, params=base, overwrite=True)
        plot_loss(folder.metrics, folder.image, f"LoRA of rank {plan.config.rank} on {plan.target.name}")
        self._title(f"Files in {folder.path}")
        written = {folder.adapter: "the adapter", folder.metrics: "losses", folder.image: "the loss curve"}
        for path, what in {**written, folder.config: "every option, resolved"}.items():
            self._terminal.say(f"{path}: {what}")

    def _verify(self, base: Any) -> Any:
        """Load the adapter, merge it, and compare the merged model with the adapted one."""
        loaded = lora.load(self._folder.adapter, base)
        merged = lora.merge(base, loaded)
        tokens = self._held_out(self._plan.target)[:16, :-1]
        adapted = np.asarray(self._adapted(base, loaded, tokens))
        difference = float(np.abs(self._plain(merged, tokens) - adapted).max())
        bound = _TOLERANCE * float(np.abs(adapted).max())
        if not difference <= bound:
            raise TrainingError(
                f"merged and adapted logits differ by {difference:.2e}, more than {bound:.2e}: do not merge"
            )
        self._title("Adapter loaded from disk and merged into the base")
        self._terminal.say(f"Logits of merged and adapted model agree: largest difference {difference:.1e}")
        self._result["difference"] = difference
        return merged

    def _sample(self, base: Any, merged: Any) -> None:
        text = self._plan.target.held_out.tobytes()
        prose = re.search(rb"\n\n(?=[A-Z].{%d})" % _PROMPT, text)
        start = prose.end() if prose else 0
        prompt = text[start : start + _PROMPT]
        tokens = jnp.frombuffer(prompt, jnp.uint8)[None]
        self._title("Samples, from a held-out beginning")
        for title, variables in {"base": base, "adapted": merged}.items():
            sample = generate(variables, self._model, tokens, _SAMPLE, temperature=_TEMPERATURE, key=self._step_key)
            # Decoded as one text, so that a character cut in two at the seam stays whole.
            written = (prompt + np.asarray(sample[0]).tobytes()).decode(errors="replace")
            self._terminal.quote(title, written)
            self._result.setdefault("samples", {})[title] = written

    def _held_out(self, text: Corpus) -> Bytes:
        return windows(text.held_out, self._plan.training.length, EVALUATED)

    def _title(self, title: str) -> None:
        self._terminal.title(title)
