"""Experts that a program reads with one product, as a stack of weights: each with factors of its own."""

from collections.abc import Collection, Iterator
from dataclasses import replace

from lora_jax.adapter.site import Site, Sites
from lora_jax.errors import MatchError, nearest
from lora_jax.paths import hits


def own_experts(sites: Sites, names: Collection[str] | None = None) -> Sites:
    """Sites in which the axis of experts is one of a stack.

    A program like `einsum("bd,edh->ebh", x, up)` does not say whether `e` counts experts. It is taken to if it is the
    first axis of the parameter and goes on in another weight of the same module: `down` in
    `einsum("ebh,ehd->bd", hidden, down)`. Heads that are stored in front look the same; `names` tells them apart.

    Args:
      sites: from `find_sites`.
      names: parameters whose first axis counts experts, as in `LoraConfig.targets`; None for the rule above.

    Raises:
      MatchError: a name hits no site that could be a stack of experts.

    Example:
      >>> up = Site(path="moe/up", shape=(3, 4, 8), dtype="float32", kind="dense", in_axes=(1,), out_axes=(0, 2))
      >>> down = Site(path="moe/down", shape=(3, 8, 4), dtype="float32", kind="dense", in_axes=(0, 1), out_axes=(2,))
      >>> own_experts(Sites([up, down]))["moe/up"].batch_axes
      (0,)
    """
    apart = {site.path: stacked for site in sites.values() if (stacked := _stacked(site)) is not None}
    if names is None:
        chosen = {path for path in apart if _goes_on(sites[path], sites)}
    else:
        chosen = {path for path in apart if hits(names, path)}
        for name in names:
            stacks = any(hits((name,), path) for path, site in sites.items() if path in apart or site.batch_axes)
            if not stacks:
                raise MatchError(f"experts: {name!r} hits no stack of experts; nearest: {nearest(name, sites)}")
    return Sites(
        [apart[path] if path in chosen else site for path, site in sites.items()], sites.all_paths, sites.missed
    )


def _stacked(site: Site) -> Site | None:
    """The site with its first axis, after those that are stacked already, as one more of the stack."""
    axis = next((axis for axis in range(len(site.shape)) if axis not in site.batch_axes), None)
    into, out = (tuple(each for each in axes if each != axis) for axes in (site.in_axes, site.out_axes))
    if site.kind != "dense" or axis is None or not into or not out:
        return None
    return replace(site, in_axes=into, out_axes=out, batch_axes=(*site.batch_axes, axis), channel_axis=None)


def _goes_on(site: Site, sites: Sites) -> bool:
    """Whether another weight of the module has the axis in another role."""
    axis = min(set(range(len(site.shape))) - {*site.batch_axes})
    for other in sites.values():
        beside = other.path != site.path and {*_modules(other.path)} & {*_modules(site.path)}
        if beside and axis < len(other.shape) and other.shape[axis] == site.shape[axis]:
            roles = (other.batch_axes, other.in_axes if axis in site.out_axes else other.out_axes)
            if any(axis in role for role in roles):
                return True
    return False


def _modules(path: str) -> Iterator[str]:
    """The module that holds a parameter, and the one around that: `moe/up/kernel` and `moe/down/kernel` are beside."""
    module = path.rpartition("/")[0]
    yield module
    if "/" in module:
        yield module.rpartition("/")[0]
