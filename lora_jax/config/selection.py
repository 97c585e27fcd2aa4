"""Which parameters a configuration adapts, and which it trains in full; nothing is ever missed in silence."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from lora_jax.adapter.site import Site, Sites
from lora_jax.config.checks import as_tuple, pairs
from lora_jax.config.config import LoraConfig
from lora_jax.config.experts import own_experts
from lora_jax.config.parts import expanded
from lora_jax.config.state import collections_beside
from lora_jax.errors import MatchError, nearest
from lora_jax.paths import ALL_LINEAR, bias_beside, hits, inside, layer_number, lookup, name_hits, pattern_hits


@dataclass(frozen=True)
class Selection:
    """What a configuration selects among the parameters of a program.

    Attributes:
      sites: parameters that get low-rank factors, in the order of the `Sites`.
      train: paths of parameters trained in full (`train` and `bias`), in the order of the tree.
      shifted: for each bias that is added to (`lora_bias`), the site whose factors it is beside.
      rows: look-up tables of which rows are trained, with the numbers of those.
    """

    sites: tuple[Site, ...]
    train: tuple[str, ...]
    shifted: tuple[tuple[str, Site], ...] = ()
    rows: tuple[tuple[Site, tuple[int, ...]], ...] = ()


def select(config: LoraConfig, sites: Sites, state: Collection[str] = ()) -> Selection:
    """Apply a configuration to the sites of a program.

    The order is PEFT's: what `exclude` or `train` names is never targeted. Unlike in PEFT, where a partial miss is
    silent, every single name, regex, layer number and pattern key has to hit something.

    State is no parameter: what stands beside linen's `params` (`batch_stats`, caches) is left out, and refused where a
    name hits nothing else.

    Args:
      config: what to select.
      sites: what there is, from `find_sites`.
      state: paths that are known to be state otherwise.

    Returns:
      The selected sites and the paths trained in full.

    Raises:
      MatchError: something in the config hits nothing; the message names the nearest paths.

    Example:
      >>> sites = Sites([Site(path=f"layers_{i}/query/kernel", shape=(4, 4), dtype="float32", kind="dense",
      ...                     in_axes=(0,), out_axes=(1,)) for i in range(3)])
      >>> [site.path for site in select(LoraConfig(targets=("query",), layers=1), sites).sites]
      ['layers_1/query/kernel']
    """
    everything, state = sites, {*state, *collections_beside(sites.all_paths)}
    for field, match in (("targets", hits), ("train", lambda name, path: inside(name[0], path))):
        _check_no_state(field, getattr(config, field), match, everything.all_paths, state)
    sites = Sites(
        [site for path, site in sites.items() if path not in state],
        tuple(path for path in sites.all_paths if path not in state),
        sites.missed,
    )
    if config.experts != "shared":
        sites = own_experts(sites, None if config.experts == "own" else as_tuple(config.experts))
    train = _train(config, sites)
    excluded = _excluded(config, everything)
    targeted = _targeted(config, sites)
    layered = _in_layers(config, targeted, sites)
    chosen = [path for path in layered if path not in excluded and path not in train]
    if not chosen:
        raise MatchError(
            f"Nothing is left to adapt: all {len(layered)} targeted parameters ({_some(layered)}) are taken out again "
            f"by exclude={config.exclude!r} or train={config.train!r}. {_NEXT}"
        )
    modules = expanded(config.parts, chosen)
    for field in ("rank_pattern", "alpha_pattern"):
        check_patterns(field, pairs(getattr(config, field)), modules)
    train |= _biases(config, chosen, sites)
    return Selection(
        sites=tuple(sites[path] for path in chosen),
        train=tuple(path for path in sites.all_paths if path in train),
        shifted=_shifted(chosen, train, sites) if config.lora_bias else (),
        rows=tuple(_table(name, rows, {*chosen, *train}, sites) for name, rows in config.tables()),
    )


def _check_no_state(
    field: str, wanted: Any, match: Callable[[Any, str], bool], paths: Collection[str], state: set[str]
) -> None:
    """Refuse a name that hits state and no parameter."""
    for name in [] if wanted == ALL_LINEAR else _each(wanted):
        hit = [path for path in paths if match(name, path)]
        if hit and state.issuperset(hit):
            raise MatchError(
                f"{field}: {name if isinstance(name, str) else name[0]!r} hits only state that the program writes "
                f"({_some(hit)}), and no parameter. State neither trains nor has factors: leave it out of {field}= and "
                "let the program update it, as docs/state.md shows. If these are parameters, give them as a tree of "
                "their own, or inside of the collection 'params'."
            )


def _targeted(config: LoraConfig, sites: Sites) -> list[str]:
    if config.targets == ALL_LINEAR:
        found = [path for path, site in sites.items() if site.kind in ("dense", "ragged") and not site.head]
        if not found:
            raise MatchError(
                f'targets="all-linear" hits none of the {len(sites)} sites: it leaves out output heads, look-up '
                f"tables and convolutions, so name those to adapt them. {_listing(sites)} {_NEXT}"
            )
        return found
    for wanted in _each(config.targets):
        if not any(hits(wanted, path) for path in sites):
            raise MatchError(_missed_target(wanted, config, sites))
    return [path for path in sites if hits(config.targets, path)]


def _missed_target(wanted: str | tuple[str, ...], config: LoraConfig, sites: Sites) -> str:
    name = wanted if isinstance(wanted, str) else wanted[0]
    bypassed = [path for path in sites.all_paths if hits(wanted, path)]
    if bypassed:
        why = [str(each) for each in sites.missed if each.path in bypassed]
        return (
            f"targets: {name!r} hits only parameters that the program does not use linearly ({_some(bypassed)}), so "
            "low-rank factors cannot adapt them. "
            + (f"{'. '.join(why)}. " if why else "To train them in full, name them in train=. ")
            + _listing(sites)
        )
    return (
        f"targets: {name!r} hits none of the {len(sites)} sites. {_hint(wanted, tuple(sites))}{_listing(sites)} {_NEXT}"
    )


def _excluded(config: LoraConfig, sites: Sites) -> set[str]:
    for wanted in _each(config.exclude):
        if not any(hits(wanted, path) for path in sites.all_paths):
            name = wanted if isinstance(wanted, str) else wanted[0]
            raise MatchError(f"exclude: {name!r} hits no parameter. {_hint(wanted, sites.all_paths)}{_NEXT}")
    return {path for path in sites.all_paths if config.exclude and hits(config.exclude, path)}


def _train(config: LoraConfig, sites: Sites) -> set[str]:
    names = as_tuple(config.train)
    for name in names:
        if not any(inside(name, path) for path in sites.all_paths):
            raise MatchError(f"train: {name!r} hits no parameter. Nearest: {nearest(name, sites.all_paths)}. {_NEXT}")
    return {path for path in sites.all_paths if any(inside(name, path) for name in names)}


def _in_layers(config: LoraConfig, targeted: list[str], sites: Sites) -> list[str]:
    if config.layers is None:
        return targeted
    wanted, patterns = as_tuple(config.layers), as_tuple(config.layers_pattern)
    for pattern in patterns:
        if all(layer_number(path, (pattern,)) is None for path in targeted):
            raise MatchError(
                f"layers_pattern: no number follows {pattern!r} in the path of a targeted parameter "
                f"({_some(targeted)}). {_stacked(targeted, sites)}{_NEXT}"
            )
    numbers = {path: layer_number(path, patterns) for path in targeted}
    present = {number for number in numbers.values() if number is not None}
    for number in wanted:
        if number not in present:
            raise MatchError(
                f"layers: no targeted parameter is in layer {number}; the numbered layers that hold some are "
                f"{sorted(present)} ({_some(targeted)}). {_stacked(targeted, sites)}{_NEXT}"
            )
    return [path for path in targeted if numbers[path] in wanted]


def _stacked(targeted: list[str], sites: Sites) -> str:
    stacked = [path for path in targeted if sites[path].batch_axes]
    if not stacked:
        return ""
    return f"Layers stacked in one parameter ({_some(stacked)}) share a path and cannot be told apart by it. "


def check_patterns(field: str, patterns: Iterable[tuple[str, object]], chosen: list[str]) -> None:
    """Refuse patterns of which one applies to none of the adapted parameters.

    Raises:
      MatchError: a pattern matches nothing, or only what earlier ones match.
    """
    patterns = tuple(patterns)
    applied = {found[0] for path in chosen if (found := lookup(patterns, path))}
    for key, _ in patterns:
        if key in applied:
            continue
        if any(pattern_hits(key, path) for path in chosen):
            raise MatchError(f"{field}: {key!r} never applies: earlier keys match all it does. Put it before them.")
        raise MatchError(
            f"{field}: {key!r} matches none of the {len(chosen)} adapted parameters. Nearest: "
            f"{nearest(key.replace('.', '/'), chosen)}. {_NEXT}"
        )


def _biases(config: LoraConfig, chosen: list[str], sites: Sites) -> set[str]:
    if config.bias == "none":
        return set()
    paths = set(sites.all_paths)
    modules = {path.rpartition("/")[0] for path in chosen}
    wanted: dict[str, Callable[[str], bool]] = {"all": lambda module: True, "lora_only": modules.__contains__}
    biases = {path for path in paths if _is_bias(path, paths) and wanted[config.bias](path.rpartition("/")[0])}
    if not biases:
        where = "in the model" if config.bias == "all" else "beside an adapted parameter"
        raise MatchError(f"bias={config.bias!r} hits nothing: no parameter {where} is a bias. Use bias='none'.")
    return biases - set(chosen)


def _shifted(chosen: list[str], train: set[str], sites: Sites) -> tuple[tuple[str, Site], ...]:
    """The bias beside each chosen site; without one, a bias on B has no place."""
    found: dict[str, Site] = {}
    for path in chosen:
        bias = bias_beside(path, sites.all_paths)
        if bias is None or bias in train or bias in found:
            why = "has no bias beside it" if bias is None else f"would share {bias!r} with another update"
            raise MatchError(
                f"lora_bias: {path!r} {why}, and a bias on B is an addition to that. Leave the parameter out with "
                f"exclude=, or the bias with lora_bias=False. {_NEXT}"
            )
        found[bias] = sites[path]
    return tuple(found.items())


def _table(name: str, rows: tuple[int, ...], taken: set[str], sites: Sites) -> tuple[Site, tuple[int, ...]]:
    """The look-up table of which rows are to be trained."""
    tables = [path for path, site in sites.items() if site.kind == "embedding" and not site.batch_axes]
    found = [path for path in tables if not name or hits((name,), path)]
    if len(found) != 1:
        raise MatchError(
            f"trainable_tokens: {name!r} hits {len(found)} of the look-up tables ({_some(tables)}): name one, as "
            f"{{name: numbers}}. {_NEXT}"
        )
    site = sites[found[0]]
    if max(rows) >= site.fan_in:
        raise MatchError(f"trainable_tokens: row {max(rows)} of {site.path!r}, which has {site.fan_in} rows")
    if site.path in taken:
        raise MatchError(
            f"trainable_tokens: {site.path!r} is adapted or trained in full too, and holds one update. Leave it out of "
            "targets and train, or train it whole."
        )
    return site, rows


def _is_bias(path: str, paths: set[str]) -> bool:
    module, _, leaf = path.rpartition("/")
    return leaf == "bias" or (leaf == "b" and f"{module}/w" in paths)


_NEXT = "To see every site: print(lora_jax.find_sites(fn, params, ...))."


def _each(wanted: str | Collection[str]) -> list[str | tuple[str, ...]]:
    return [wanted] if isinstance(wanted, str) else [(name,) for name in wanted]


def _hint(wanted: str | tuple[str, ...], candidates: Collection[str]) -> str:
    name = wanted if isinstance(wanted, str) else wanted[0]
    like_a_regex = re.search(r"[*+?|\\^$()\[\]{}]", name)
    if isinstance(wanted, str):
        hint = (
            "A regex must match a whole path." if like_a_regex else f"One string is a regex; for a name: ({name!r},)."
        )
        return f"{hint} Nearest: {nearest(name, candidates)}. "
    below = [path for path in candidates if inside(name, path) and not name_hits(name, path)]
    if below:
        return (
            f"It is a module above {len(below)} parameters ({_some(below)}): name the layers in it, or use the regex "
            f"{f'(.*/)?{re.escape(name)}/.*'!r}. "
        )
    if like_a_regex:
        return f"It looks like a regex, and a collection holds names; a regex is given alone, as {name!r}. "
    return f"Nearest: {nearest(name.replace('.', '/'), candidates)}. "


def _listing(sites: Sites) -> str:
    return f"Sites include: {_some(list(sites))}."


def _some(paths: list[str], count: int = 3) -> str:
    more = f", ... {len(paths) - count} more" if len(paths) > count else ""
    return (", ".join(paths[:count]) or "none") + more
