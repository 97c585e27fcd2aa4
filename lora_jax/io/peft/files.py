"""PEFT adapters as plain NumPy: what `adapter_model.safetensors` and `adapter_config.json` say.

Neither a model nor a JAX program is involved. Names are those of PyTorch modules relative to the base model.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_jax.errors import CheckpointError, listed
from lora_jax.io.peft import config as peft_config
from lora_jax.io.peft.config import mask_of
from lora_jax.io.peft.match import saves, targets
from lora_jax.io.peft.module import Module, delta

# Layers that `save_embedding_layers` writes although no config names them.
EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_in", "embed_out", "tok_embeddings",
    "token_embedding", "embed", "embedding", "embeddings", "output", "head",
)  # fmt: skip

TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""What follows the name of a table's module in the key of its trained rows."""

_TOKENS = re.compile(r"(\.token_adapter)?\.trainable_tokens_delta$")


@dataclass(frozen=True)
class PeftFiles:
    """An adapter as PEFT stores it.

    Attributes:
      config: `adapter_config.json` as it is; what it lacks is completed from the arrays.
      modules: factors by the name of their module, as in `model.layers.0.self_attn.q_proj`. Where several parameters
        of one module are adapted, PEFT nests them: `experts` is the outermost, `experts.base_layer` the next.
      saved: whole tensors by the name they have in the base model (`modules_to_save`, biases, saved embeddings), and
        rows as `<module>.token_adapter.trainable_tokens_delta`.
      where: the file they come from, for error messages.
      unscaled: modules of which nothing tells the scale: `alpha` and `scale` raise for them.
      base: of the JAX model that `save` was given: samples of the values of its parameters, by path and dtype with
        shape, such as `layers/kernel float32[4,3]`.

    Example:
      >>> files = PeftFiles({"r": 2, "lora_alpha": 4}, {"q": Module("linear", np.ones((2, 4)), np.ones((3, 2)))}, {})
      >>> files.rank("q"), files.scale("q"), float(files.delta("q", (3, 4))[0, 0])
      (2, 2.0, 4.0)
    """

    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)
    where: str = "the adapter"
    unscaled: frozenset[str] = frozenset()
    base: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module: str, experts: int = 1) -> int:
        """The rank of a module: that of its arrays, which is per weight where a parameter stacks several."""
        return self.modules[module].a.shape[0] // experts

    def whole(self, module: str) -> Module:
        """A module with the terms that AdaLoRA pruned back in their places, as zeros.

        Example:
          >>> config = {"peft_type": "ADALORA", "init_r": 3, "rank_pattern": {"q.lora_E": [False, True, True]}}
          >>> kept = Module("linear", np.ones((2, 4)), np.ones((5, 2)), values=np.ones(2))
          >>> PeftFiles(config, {"q": kept}).whole("q").values.tolist()
          [0.0, 1.0, 1.0]
        """
        found, mask = self.modules[module], mask_of(self.config, module)
        if mask is None or found.values is None:
            return found
        rank, kept = len(mask), np.array(mask)
        a, values = (np.zeros((rank, *each.shape[1:]), each.dtype) for each in (found.a, found.values))
        b = np.zeros((len(found.b), rank), found.b.dtype)
        a[kept], b[:, kept], values[kept] = found.a, found.b, found.values
        return replace(found, a=a, b=b, values=values)

    def alpha(self, module: str, parameter: str | None = None) -> float:
        """Alpha of a module: the first `alpha_pattern` key that matches, else `lora_alpha`, else PEFT's 8; VeRA's is r.

        Args:
          module: its name.
          parameter: full name of the adapted parameter, for kind `parameter`: PEFT looks that up in its patterns.

        Raises:
          CheckpointError: nothing tells it.
        """
        self.check_scales([module])
        return peft_config.alpha_of(self.config, parameter or module, self.rank(module))

    def scale(self, module: str, parameter: str | None = None, experts: int = 1) -> float:
        """`alpha / rank` of a module, or what its kind has instead; arguments and errors as above."""
        self.check_scales([module])
        return peft_config.scale_of(self.config, parameter or module, self.rank(module, experts))

    def check_scales(self, modules: Collection[str] | None = None) -> None:
        """Refuse modules, all by default, of which nothing tells the scale.

        Raises:
          CheckpointError: there are some.
        """
        if lacking := self.unscaled.intersection(self.modules if modules is None else modules):
            raise CheckpointError(
                f"{self.where}: nothing tells what the updates of {listed(sorted(lacking), count=3)} are multiplied "
                "by: no adapter_config.json beside the file, no lora_adapter_metadata in it, and no .alpha tensor. "
                "Pass alpha= (--alpha on the command line), the lora_alpha of the training: the scale is alpha / rank."
            )

    def delta(
        self, module: str, shape: tuple[int, ...], *, parameter: str | None = None, transposed: bool | None = None
    ) -> np.ndarray:
        """What the adapter adds to a weight, scale included, in PyTorch's layout.

        Args:
          module: name of the module.
          shape: shape of the tensor to add to: it tells a stack of experts, groups, and how the weight lies.
          parameter: full name of the adapted parameter, for kind `parameter`.
          transposed: whether the weight is stored `(in, out)`, or `(experts, in, out)`. By default it is read off
            the shape, and off `fan_in_fan_out` for a square one.

        Returns:
          Float32 array of the given shape.

        Raises:
          CheckpointError: the factors do not fit the shape, a square stack of experts needs `transposed`, or the
            change is not one of the weight alone (DoRA, convolutions in groups).

        Example:
          >>> module = Module("embedding", np.ones((2, 9)), np.ones((4, 2)))
          >>> PeftFiles({"lora_alpha": 2}, {"wte": module}).delta("wte", (9, 4)).shape
          (9, 4)
        """
        found = self.modules[module]
        if self.config.get("alora_invocation_tokens"):
            raise CheckpointError(f"{self.where}: aLoRA acts only after its invocation tokens, as no delta can")
        if found.magnitude is not None:
            raise CheckpointError(
                f"{self.where}: {module} uses DoRA, which rescales the weight itself, so it has no delta to add. "
                "Merge it in PEFT (merge_and_unload)."
            )
        stacked = found.kind == "parameter" and len(shape) == 3
        scale = self.scale(module, parameter, shape[0] if stacked else 1)
        return delta(f"{self.where}: {parameter or module}", found, scale, shape, self._transposed(found, transposed))

    def _transposed(self, module: Module, given: bool | None) -> bool | None:
        if given is not None or module.kind == "parameter":
            return given
        return bool(peft_config.setting(self.config, "fan_in_fan_out")) if module.kind == "linear" else None

    def owners(self, shapes: Mapping[str, tuple[int, ...]], *, ordered: bool = False) -> dict[str, str]:
        """Which entry of `modules` belongs to which parameter, for modules of kind `parameter`.

        The files say only how deep the entries of one module are nested; the parameters that PyTorch declares first
        are nested deepest.

        Args:
          shapes: shapes of the base's tensors by full name; those that `target_parameters` does not name are ignored.
          ordered: whether `shapes` is in the order in which the modules declare their parameters. If not, parameters
            of one module are told apart by their shapes.

        Returns:
          Name in `modules` by full name of the parameter.

        Raises:
          CheckpointError: an entry has no parameter, or shapes cannot tell them apart.
        """
        return _owners(self.where, self.modules, self.config.get("target_parameters") or (), shapes, ordered)


def token_rows(saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trained rows by the module that holds the table.

    >>> list(token_rows({"wte.token_adapter.trainable_tokens_delta": np.ones((1, 2)), "up.bias": np.ones(3)}))
    ['wte']
    """
    return {_TOKENS.sub("", name): rows for name, rows in saved.items() if _TOKENS.search(name)}


def full_tensors(saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that are there in full: all but trained rows."""
    return {name: value for name, value in saved.items() if not _TOKENS.search(name)}


def base_tables(files: PeftFiles) -> dict[str, np.ndarray]:
    """The whole tensors that the config does not train: the base's own tables, unless another base is meant.

    PEFT writes them beside the factors of a table, and where a vocabulary was resized.

    >>> tables = {"wte.weight": np.ones((9, 4)), "head.weight": np.ones((9, 4)), "up.bias": np.ones(3)}
    >>> list(base_tables(PeftFiles({"modules_to_save": ["head"]}, {}, tables)))
    ['wte.weight']
    """
    trained = files.config.get("modules_to_save")
    whole = full_tensors(files.saved).items()
    return {name: value for name, value in whole if not name.endswith(".bias") and not saves(trained, name)}


def table_name(name: str) -> str:
    """The tensor of the base that one of an adapter's belongs to."""
    return _TOKENS.sub(".weight", name)


def token_indices(where: str, config: Mapping[str, Any], module: str, rows: np.ndarray) -> tuple[int, ...]:
    """Numbers of the rows that an adapter trains of a module's table.

    Raises:
      CheckpointError: the config does not have one for each of them.
    """
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((ids for key, ids in given.items() if module == key or module.endswith(f".{key}")), None)
    numbers = tuple(given) if isinstance(given, Sequence) else ()
    known = all(isinstance(number, int) and number >= 0 for number in numbers)
    if rows.ndim != 2 or len(numbers) != len(rows) or not numbers or not known:
        raise CheckpointError(
            f"{where}: {module} has trained rows of shape {rows.shape}, and trainable_token_indices={given!r} must "
            "name one row number for each"
        )
    return numbers


def _owners(
    where: str,
    modules: Mapping[str, Module],
    wanted: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    ordered: bool,
) -> dict[str, str]:
    """Names in `modules` by parameter; see `PeftFiles.owners`."""
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        if module.kind == "parameter":
            groups.setdefault(name.replace(".base_layer", ""), []).append(name)
    found: dict[str, str] = {}
    for owner, levels in groups.items():
        # Innermost first: that is the order in which the parameters are declared.
        levels.sort(key=len, reverse=True)
        names = [name for name in shapes if name.rpartition(".")[0] == owner and targets(list(wanted), name)]
        if len(names) != len(levels):
            raise CheckpointError(
                f"{where}: {owner} has {len(levels)} adapted parameters, but target_parameters={sorted(wanted)} names "
                f"{len(names)} of the base's there: {', '.join(names) or 'none'}"
            )
        chosen = levels if ordered else _by_shape(where, {level: modules[level] for level in levels}, names, shapes)
        found |= dict(zip(names, chosen, strict=True))
    return found


def _by_shape(
    where: str, levels: Mapping[str, Module], names: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The level of each name, where shapes leave one possibility."""
    fits = {name: [level for level, module in levels.items() if _fits(module, shapes[name])] for name in names}
    chosen = [options[0] for options in fits.values() if len(options) == 1]
    if len(set(chosen)) != len(names):
        raise CheckpointError(
            f"{where}: the shapes of {' and '.join(names)} do not tell which factors belong to which. Give the "
            "parameters in the order in which the module declares them, with ordered=True."
        )
    return chosen


def _fits(module: Module, shape: tuple[int, ...]) -> bool:
    sizes = (module.a.shape[1], module.b.shape[0])
    stack = shape[0] if len(shape) == 3 else 1
    return sorted(sizes) == sorted(shape[-2:]) and module.a.shape[0] % stack == 0
