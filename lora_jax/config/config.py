"""LoraConfig: what to adapt and how; frozen, keyword-only, validated once."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from lora_jax.adapter import registry
from lora_jax.config import checks, peft_fields
from lora_jax.config import parts as part_columns
from lora_jax.errors import ConfigError
from lora_jax.paths import ALL_LINEAR, lookup


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What to adapt and how.

    Validated at once, hashable, never changed. Names and meanings follow PEFT's `LoraConfig`; the differences are
    stated field by field. Collections are stored as tuples, so `LoraConfig(**dataclasses.asdict(config)) == config`,
    through JSON too.

    Attributes:
      rank: number of rank-one terms (PEFT `r`).
      alpha: numerator of the scale `alpha / rank`. None means `2 * rank` of each site, a scale of 2 whatever
        the rank. PEFT's default is a constant 8, which silently damps high ranks.
      targets: parameters to adapt. A collection of names selects the parameters of modules whose path ends with a
        name, on whole components (`query`, `attn/query`, `attn.query`); a name may include the
        parameter's own (`q_einsum/w`). *One string* is a regex that must match a whole path or module
        path, joined with `/` or `.`. `"all-linear"` is every dense or grouped matmul but *not* an output
        head, a look-up table or a convolution: name those to adapt them. PEFT leaves the head out only for
        Transformers models.
      exclude: names or one regex, matched likewise; wins over `targets`.
      layers: numbers of the layers to adapt, counted as in `lora_jax.paths.layer_number`. Applies to exact names
        too (in PEFT a full name bypasses it), and to `"all-linear"`; not to a regex, as in PEFT.
      layers_pattern: names that the number must follow, where a path has several numbers.
      rank_pattern: `{regex: rank}`; the first key that matches the end of a site's name wins. For a parameter that is
        a stack of layers or experts, a rank may be a tuple with one for each: the factors are padded with zeros.
      alpha_pattern: `{regex: alpha}`, likewise.
      rslora: scale by `alpha / sqrt(rank)`.
      dropout: probability of dropping elements of the input of A in training. As in PEFT, look-ups have none.
      method: the variant of LoRA: `"lora"`, `"dora"`, or another of `lora_jax.methods.names()`.
      init: how factors start: `"default"` (PEFT's), `"gaussian"`, `"orthogonal"`, or another of
        `lora_jax.initialisers()`.
      train: names of parameters, or of modules with all they hold, trained in full (PEFT `modules_to_save`) and never
        given factors. `head` trains `head/kernel` but not `subhead/kernel`, which PEFT trains too.
      bias: biases trained in full: `"none"`, `"all"`, or `"lora_only"`, those beside an adapted parameter. A bias is a
        parameter named `bias`, as in PEFT, or Haiku's `b` beside a `w`.
      lora_bias: put a bias on B too (PEFT `lora_bias`): a scaled addition to the bias beside each adapted parameter. A
        layer without a bias is an error.
      trainable_tokens: rows of look-up tables trained in full (PEFT `trainable_token_indices`): their numbers, where
        the model has one table, or `{name: numbers}`. Output heads that are tied to the table see them too.
      seed: of the frozen random projections of `method="vera"` (PEFT `projection_prng_key`).
      invocation_tokens: of `method="alora"`: the sequence of tokens after which the adapter acts (PEFT
        `alora_invocation_tokens`).
      experts: `"shared"`: experts that a program reads one input with, in one product, share A and rank, which costs
        least. `"own"`: each has its own, as where experts are a stack to the program. That is for every parameter whose
        first axis goes on in another weight of its module, which may be heads too; names, as in `targets`, say which.
      parts: parts of fused kernels, each with an A of its own: by name of the kernel, as in `targets`, the names of the
        parts and where their columns are, `{"c_attn": {"q": (0, 768), "v": (1536, 2304)}}`; what is in no part is not
        adapted. Columns are counted along the first output axis, or along the parameter's axis that comes third. In
        `rank_pattern` and `alpha_pattern` a part is a module of its own, `c_attn/q`. PEFT has one A for all.
      param_dtype: dtype of what trains, float32 by default even under a bfloat16 model.

    Raises:
      ConfigError: a field is out of range or contradicts another.

    Example:
      >>> import lora_jax as lora
      >>> config = lora.LoraConfig(rank=16, targets=("query", "value"), rank_pattern={"layers_0/query": 4})
      >>> config.rank_for("layers_0/query/kernel"), config.rank_for("layers_1/query/kernel")
      (4, 16)
      >>> config.scale_for("layers_1/query/kernel")
      2.0

    References:
      Hu et al., LoRA, arXiv 2106.09685. Kalajdzievski, rsLoRA, arXiv 2312.03732. Methods and initialisers name theirs.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | Collection[str] = ALL_LINEAR
    exclude: str | Collection[str] = ()
    layers: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] = ()
    rank_pattern: checks.Patterns = ()
    alpha_pattern: checks.Patterns = ()
    rslora: bool = False
    dropout: float = 0.0
    method: str = "lora"
    init: str = "default"
    train: str | Collection[str] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    trainable_tokens: checks.Tokens = ()
    seed: int = 0
    invocation_tokens: Collection[int] = ()
    experts: str | Collection[str] = "shared"
    parts: part_columns.Given = ()
    param_dtype: Any = "float32"

    def __post_init__(self) -> None:
        """Normalise every field, then check those that depend on each other."""
        self._set("rank", checks.positive_int("rank", self.rank))
        self._set("alpha", None if self.alpha is None else checks.positive("alpha", self.alpha))
        self._set("targets", checks.wanted("targets", self.targets))
        self._set("exclude", checks.wanted("exclude", self.exclude))
        self._set("layers", None if self.layers is None else checks.layers(self.layers))
        self._set("layers_pattern", checks.names("layers_pattern", self.layers_pattern))
        self._set("rank_pattern", checks.patterns("rank_pattern", self.rank_pattern, checks.ranks))
        self._set("alpha_pattern", checks.patterns("alpha_pattern", self.alpha_pattern, checks.alphas))
        self._set("dropout", checks.probability("dropout", self.dropout))
        self._set("train", checks.names("train", self.train))
        self._set("trainable_tokens", checks.tokens("trainable_tokens", self.trainable_tokens))
        self._set("seed", checks.seed("seed", self.seed))
        self._set("invocation_tokens", checks.sequence("invocation_tokens", self.invocation_tokens))
        self._set("parts", part_columns.checked(self.parts))
        self._set("param_dtype", checks.float_dtype("param_dtype", self.param_dtype))
        for switch in ("rslora", "lora_bias"):
            if not isinstance(getattr(self, switch), bool):
                raise ConfigError(f"{switch}={getattr(self, switch)!r} must be True or False")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias={self.bias!r} must be one of 'none', 'all', 'lora_only'")
        if self.experts not in ("shared", "own"):
            if isinstance(self.experts, str):
                raise ConfigError(f"experts={self.experts!r} must be 'shared', 'own', or names of parameters")
            self._set("experts", checks.names("experts", self.experts))
        if self.experts != "shared" and {"inputs", "components", "gradient"} & {*registry.find_init(self.init).reads}:
            raise ConfigError(
                f"experts={self.experts!r} beside init={self.init!r}, whose data are of products: use another init"
            )
        registry.find_init(self.init)
        self._check_method(registry.METHODS.find(self.method))
        self._check_layers()
        if self.lora_bias and self.bias != "none":
            raise ConfigError(f"lora_bias=True adds to the biases that bias={self.bias!r} trains in full: choose one")

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _check_layers(self) -> None:
        if not self.targets:
            raise ConfigError('targets is empty: give names, one regex, or "all-linear"')
        if self.layers_pattern and self.layers is None:
            raise ConfigError(f"layers_pattern={self.layers_pattern!r} has no effect without layers=...")
        if self.layers is not None and isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ConfigError(
                f"layers={self.layers!r} cannot be combined with the regex targets={self.targets!r}: put the numbers "
                f"in the regex, or give names: targets=({self.targets!r},)"
            )

    def _check_method(self, method: registry.Method) -> None:
        """Refuse what a method does not combine with; `docs/methods.md` has the table."""
        if bool(self.invocation_tokens) != (self.method == "alora"):
            raise ConfigError(
                f'invocation_tokens={self.invocation_tokens!r} beside method={self.method!r}: method="alora" needs the '
                "tokens after which it acts, and no other method has any"
            )
        if not method.draws and self.init != "default":
            raise ConfigError(
                f"method={self.method!r} has its own start, so init={self.init!r} has no effect: leave it"
            )
        if self.parts and self.method != "lora":
            raise ConfigError(f'parts={self.parts!r} are for method="lora", not {self.method!r}')
        if not method.lora_bias and self.lora_bias:
            raise ConfigError(f"method={self.method!r} cannot have lora_bias=True")

    def ranks_for(self, path: str) -> int | tuple[int, ...]:
        """Rank at a path: that of the first `rank_pattern` key that matches, else `rank`; a tuple if layers differ."""
        found = lookup(checks.pairs(self.rank_pattern), path)
        return found[1] if found else self.rank

    def rank_for(self, path: str) -> int:
        """Rank of the factors at a path, which is the largest where layers of a stack differ."""
        return max(checks.as_tuple(self.ranks_for(path)))

    def alpha_for(self, path: str) -> float | tuple[float, ...]:
        """Alpha at a path: the first `alpha_pattern` key that matches, else `alpha`, else twice the rank there."""
        found = lookup(checks.pairs(self.alpha_pattern), path)
        if found:
            return found[1]
        if self.alpha is not None:
            return self.alpha
        ranks = self.ranks_for(path)
        return tuple(2.0 * max(rank, 1) for rank in ranks) if isinstance(ranks, tuple) else 2.0 * ranks

    def scale_for(self, path: str) -> float | tuple[float, ...]:
        """Scale at a path: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (arXiv 2312.03732)."""
        ranks, alphas = (checks.as_tuple(each) for each in (self.ranks_for(path), self.alpha_for(path)))
        count = max(len(ranks), len(alphas))
        if {len(ranks), len(alphas)} - {1, count}:
            raise ConfigError(
                f"{path} has {len(ranks)} ranks and {len(alphas)} alphas: give one for each layer, or one"
            )
        pairs = zip(alphas * (count // len(alphas)), ranks * (count // len(ranks)), strict=True)
        scales = tuple(float(alpha) / (math.sqrt(rank) if self.rslora else rank or 1) for alpha, rank in pairs)
        return scales if count > 1 else scales[0]

    def tables(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names of tables and numbers of the rows trained in them; `""` for the only table."""
        return checks.tokens("trainable_tokens", self.trainable_tokens)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> Self:
        """Build the config that PEFT's `adapter_config.json` describes.

        Fields that PEFT's file lacks take PEFT's defaults (alpha 8). Names stay as they are: where the JAX
        model names its modules differently, translate them first.

        Args:
          fields: the parsed file, or `peft.LoraConfig(...).to_dict()`.

        Raises:
          ConfigError: the file asks for something that this library would not honour.

        Example:
          >>> import lora_jax as lora
          >>> config = lora.LoraConfig.from_peft({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
          >>> config.rank, config.alpha, config.targets
          (4, 8.0, ('q_proj',))
        """
        return cls(**peft_fields.read(fields))

    def to_peft(self) -> dict[str, Any]:
        """The same config as keyword arguments of PEFT's `LoraConfig`, alpha resolved.

        `param_dtype` has no counterpart. `/` in names and pattern keys becomes PEFT's `.`; a regex is left alone.

        Returns:
          A dict that can be dumped as JSON.

        Raises:
          ConfigError: PEFT has no such initialiser, or refuses `layers` with `"all-linear"`.

        Example:
          >>> import lora_jax as lora
          >>> fields = lora.LoraConfig(targets=("attn/query",)).to_peft()
          >>> fields["r"], fields["lora_alpha"], fields["target_modules"]
          (8, 16.0, ['attn.query'])
        """
        return peft_fields.write(asdict(self))
