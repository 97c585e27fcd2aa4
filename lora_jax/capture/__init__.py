"""capture: run an unchanged function on data and collect, at every site, what an initialiser starts from."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from lora_jax.capture.captured import Captured as Captured
from lora_jax.capture.captured import Components as Components
from lora_jax.capture.captured import Gradient as Gradient
from lora_jax.capture.captured import Inputs as Inputs
from lora_jax.capture.captured import What
from lora_jax.capture.collect import explicit_mesh, mean_gradients, observed, open_batches
from lora_jax.capture.redistribute import redistribute as redistribute
from lora_jax.config.config import LoraConfig
from lora_jax.config.selection import select
from lora_jax.config.state import state_paths
from lora_jax.errors import ConfigError, ParameterError
from lora_jax.sites import find_sites


def capture(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    what: What,
    *,
    config: LoraConfig | None = None,
    rho: float = 2.0,
    passes: int = 1,
    mask: Callable[..., Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Captured:
    """Run a function on batches and collect, per site, what a data-driven initialiser starts from.

    `fn` runs unchanged, once for every batch, under `jax.jit` and compiled once per shape. Where the program uses a
    selected parameter, wherever in loops, branches and remat that is, the input is added to a running sum; nothing else
    is kept, so memory does not grow with the data. Every layer of a scanned stack and every expert has
    sums of its own, the same for every way the program may be written. What the program computes from the last captured
    inputs (logits, a loss) is not computed at all.

    * `"inputs"`: the second moment, the sum and the number of inputs, exactly; `fan_in²` numbers per site. For CorDA.
    * `"components"`: the principal components of the centred inputs, from a sketch of `fan_in × (2·k + 8)` numbers for
      `k` components. For EVA.
    * `"gradient"`: the gradient of the loss that `fn` returns by each parameter, averaged over batches, in float32.
      For LoRA-GA.

    Args:
      fn: the function `fn(params, *batch)`. For `"gradient"` it returns a scalar loss.
      params: its parameters.
      batches: any iterable of argument tuples; what is no tuple stands for a single argument.
      what: `"inputs"`, `"components"` or `"gradient"`.
      config: which parameters, as for `lora_jax.init`, and their ranks; all linear layers by default. Look-up tables
        have no inputs to capture, and convolutions only if they have one group.
      rho: for `"components"`: how many there are for each rank, so that `lora_jax.redistribute` has a choice.
      passes: for `"components"`: how often to go through `batches`, which must then be a collection. One pass finds
        components that stand out; each further one sharpens those that do not.
      mask: `mask(*batch)` gives the tokens that count, boolean, over the leading axes of every input: `labels != -100`.
      seed: of the test vectors of `"components"`; the result is a function of the arguments.
      progress: show a bar.

    Returns:
      A `Captured`: a mapping from path to `Inputs`, `Components` or `Gradient`, for `lora_jax.init(..., captured)`.

    Raises:
      ConfigError: `what` is unknown, or `batches` is empty or cannot be repeated.
      MatchError: something in `config` hits nothing.
      ParameterError: a parameter has no input that can be seen (a look-up table, a use inside `shard_map` or inside an
        operation with its own derivative), the mask does not fit, the loss is no scalar, or a result is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> params = {"layers": {"w": jnp.ones((3, 4, 4))}}  # three layers, stacked for a scan
      >>> def fn(params, x):
      ...     return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"]), None), x, params["layers"])[0]
      >>> batches = [(jax.random.normal(jax.random.key(i), (5, 4)),) for i in range(2)]
      >>> captured = lora.capture(fn, params, batches, "inputs")
      >>> captured["layers/w"].second.shape, captured["layers/w"].count
      ((3, 4, 4), Array([10., 10., 10.], dtype=float32))

    References:
      Paischer et al., EVA, arXiv 2410.07170. Yang et al., CorDA, arXiv 2406.05223. Wang et al., LoRA-GA,
      arXiv 2407.05000. Tropp et al., Nyström approximation of a streamed matrix, arXiv 1706.05736.
    """
    if what not in get_args(What):
        raise ConfigError(f"what={what!r}; choose one of {', '.join(get_args(What))}")
    config = config or LoraConfig()
    first, rounds = open_batches(batches, passes if what == "components" else 1, progress and f"capturing {what}")
    sites = select(config, find_sites(fn, params, *first), state_paths(params)).sites
    if what == "gradient":
        found = mean_gradients(fn, params, rounds, [site.path for site in sites])
    else:
        components = {site.path: min(round(config.rank_for(site.path) * rho), site.fan_in) for site in sites}
        with explicit_mesh((params, first)):
            found = observed(fn, params, rounds, what, sites, components, mask, seed)
    for path, statistic in found.items():
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(statistic)):
            raise ParameterError(
                f"What was captured at {path} is NaN or infinite: look at the batches and at the model"
            )
    return Captured(what, found)
