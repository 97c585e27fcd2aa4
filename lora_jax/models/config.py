"""`DecoderConfig`: what a decoder computes and what its tensors are called, as a value that can be hashed."""

from dataclasses import dataclass
from typing import Literal

from lora_jax.models.ropes import Rope


@dataclass(frozen=True)
class Modules:
    """What a family calls its modules; one name for two layers means that they are fused into one.

    Attributes:
      root: what holds everything but the head; modules in each other are joined by points.
      table: the look-up table of tokens.
      positions: the learned table of positions, or empty.
      layers: the stack of layers.
      last_norm: the norm after the last layer.
      head: the output head.
      attention: of a layer, with the modules of `qkv` and `out` in it.
      mlp: of a layer, with `up`, `down`, or `router` and `experts` in it.
      norms: of a layer, in the order in which they are used.
    """

    root: str = "model"
    table: str = "embed_tokens"
    positions: str = ""
    layers: str = "layers"
    last_norm: str = "norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    router: str = "gate"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


LLAMA = Modules()
"""What most families call their modules."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP.

    Attributes:
      count: how many there are.
      chosen: how many each token goes to.
      hidden: inner width of each.
      weights: how the chosen are weighed: a softmax over all, the same `normalised` to sum 1, or over the `chosen`.
      stored: whether `each` has tensors of its own, or `all` are one with the gate above up, as transformers 5 holds
        them; or as `gpt-oss` has them: `(in, out)`, with biases, and gate and up as neighbours.
      layers: for each layer whether it has them; the others have an MLP.
      limit: what gate and up of gpt-oss are clipped to.
      sharpness: of its gate's sigmoid.
    """

    count: int
    chosen: int
    hidden: int
    layers: tuple[bool, ...]
    weights: Literal["all", "normalised", "chosen"] = "normalised"
    stored: Literal["each", "all", "gpt-oss"] = "each"
    limit: float = 7.0
    sharpness: float = 1.702


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of any family; hashable, so that it can be a static argument.

    Attributes:
      family: `model_type` of the `config.json`.
      layers: number of layers.
      width: features of the residual stream.
      heads: query heads.
      kv_heads: key and value heads, each shared by as many query heads.
      head_dim: features of a head.
      hidden: inner width of the MLP.
      vocab: number of tokens.
      eps: what norms add to the variance.
      activation: name of the MLP's activation, a key of `layers.ACTIVATIONS`.
      scale: what scores are multiplied by.
      windows: for each layer how many tokens back it sees, its own included; 0 for all.
      ropes: the ropes of the model.
      rope_of: for each layer which of `ropes` it has; -1 for none.
      positions: number of learned positions; 0 for none.
      modules: what its modules are called.
      tied: whether the table is the head too.
      labels: number of classes that a head `score` tells apart, in the place of logits; 0 for a model without.
      norm: `rms`, or `layer` with means and biases.
      norm_offset: what is added to the weights of norms.
      embed_scale: what embeddings are multiplied by, rounded to their dtype.
      attention_cap: soft cap of scores; 0 for none.
      logit_cap: soft cap of logits; 0 for none.
      interleaved: whether a fused query, key and value is fused head by head.
      transposed: whether kernels are `(in, out)`, as GPT-2 has them.
      biases: which kernels have one.
      qk_norm: whether queries and keys are normalised, each head alone.
      sinks: whether each head has a score that takes probability away.
      residual: where norms stand: before each part, before and after, or before both parts at once.
      gated: whether the MLP multiplies by a gate.
      experts: the mixture of experts, or None.

    Example:
      >>> from lora_jax import models
      >>> sizes = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 16,
      ...           "num_hidden_layers": 3, "num_attention_heads": 2}
      >>> config = models.initial(sizes).config
      >>> config.family, config.layers, config.head_dim, config.tied
      ('llama', 3, 4, False)
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    eps: float
    activation: str
    scale: float
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    rope_of: tuple[int, ...]
    positions: int = 0
    modules: Modules = LLAMA
    tied: bool = False
    labels: int = 0
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    interleaved: bool = False
    transposed: bool = False
    biases: frozenset[Literal["qkv", "out", "mlp"]] = frozenset()
    qk_norm: bool = False
    sinks: bool = False
    residual: Literal["before", "around", "parallel"] = "before"
    gated: bool = True
    experts: Experts | None = None

    @property
    def mixed(self) -> bool:
        """Whether only some layers have experts, so that layers have different parameters."""
        return self.experts is not None and not all(self.experts.layers)

    @property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """The different pairs of window and rope that layers have."""
        return tuple(dict.fromkeys(zip(self.windows, self.rope_of, strict=True)))

    @property
    def kind_of(self) -> tuple[int, ...]:
        """For each layer which of `kinds` it is."""
        return tuple(self.kinds.index(pair) for pair in zip(self.windows, self.rope_of, strict=True))
