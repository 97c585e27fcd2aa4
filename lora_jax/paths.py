"""Parameter paths: how a tree's leaves are named, and what a name, a regex or a layer number matches.

A path joins dict keys, sequence indexes and attribute names with `/`: `params/layers_0/attn/query/kernel`.
Its last component is the parameter, everything before it the module. Names are compared component by
component, never by substring: `head` does not match `subhead`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax

from lora_jax import regex as safe
from lora_jax.errors import ParameterError
from lora_jax.quantised.leaf import is_quantised

ALL_LINEAR = "all-linear"
# How a box around an array is keyed: NNX's and Flax's, penzai's named arrays, and any node without keys of its own.
_BOXES = (
    jax.tree_util.GetAttrKey("value"),
    jax.tree_util.GetAttrKey("data_array"),
    jax.tree_util.FlattenedIndexKey(0),
)
_NUMBERED = re.compile(r"(?:^|/)(?:[^/]*_)?(\d+)(?=/)")


def bias_beside(path: str, paths: Collection[str]) -> str | None:
    """The bias of the module that a weight is in: a parameter named `bias`, as in PEFT, or Haiku's `b` beside a `w`.

    Example:
      >>> bias_beside("up/kernel", {"up/kernel", "up/bias"}), bias_beside("norm/w", {"norm/w"})
      ('up/bias', None)
    """
    module, _, leaf = path.rpartition("/")
    prefix = f"{module}/" if module else ""
    names = ["bias", "b"] if leaf == "w" else ["bias"]
    return next((f"{prefix}{name}" for name in names if f"{prefix}{name}" in paths), None)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or stands for one (`jax.ShapeDtypeStruct`, a tracer, a NumPy array)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """Flatten a tree into its leaves by path.

    A box around a leaf is not part of its path: the parameter that an NNX `Variable`, a Flax `Partitioned`
    or a Haliax `NamedArray` holds is `layers/0/attn/kernel`, as in an unboxed tree. A `Quantised` one is a leaf.

    Args:
      tree: any pytree. Leaves that are no arrays (functions in an Equinox module) are kept.

    Returns:
      The leaves by path, in the order of the tree, and the tree's structure, for `rebuild`.

    Raises:
      ParameterError: two leaves have the same path.

    Example:
      >>> leaves, treedef = named_leaves({"layers": [{"w": 1.0}, {"w": 2.0}]})
      >>> leaves
      {'layers/0/w': 1.0, 'layers/1/w': 2.0}
      >>> rebuild(treedef, leaves)
      {'layers': [{'w': 1.0}, {'w': 2.0}]}
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantised)
    names = _names([keys for keys, _ in entries])
    leaves = {name: leaf for name, (_, leaf) in zip(names, entries, strict=True)}
    if len(leaves) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ParameterError(
            f"Two parameters share the path {twice[0]!r}: a key that contains '/' spells the same path as nested "
            "keys. Rename one of them."
        )
    return leaves, treedef


def rebuild(treedef: Any, leaves: Mapping[str, Any]) -> Any:
    """Inverse of `named_leaves`; `leaves` must keep its order."""
    return jax.tree.unflatten(treedef, leaves.values())


def _names(keypaths: list[Any]) -> list[str]:
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys in keypaths]
    boxed = [bool(keys) and keys[-1] in _BOXES for keys in keypaths]
    if not any(boxed):
        return names
    parents = [name.rpartition("/")[0] for name in names]
    # What has siblings (the `query`, `key`, `value` of a module, the parts of a node without keys) is in no box.
    siblings = Counter(parents)
    short = [
        parent if box and parent and siblings[parent] == 1 else name
        for name, parent, box in zip(names, parents, boxed, strict=True)
    ]
    return short if len(set(short)) == len(short) else names


@lru_cache(maxsize=65536)
def components(name: str) -> tuple[str, ...]:
    """Split a path, or a name as PEFT writes it, into components.

    >>> components("layers_0/attn/query"), components("attn.query")
    (('layers_0', 'attn', 'query'), ('attn', 'query'))
    """
    return tuple(re.split(r"[./]", name))


def name_hits(name: str, path: str) -> bool:
    """Whether a target name selects a parameter: the name ends its module's path, or its own.

    PEFT compares names of modules; ending the parameter's own path is for parameters that are not the
    only one of their module, such as `q_einsum/w`.

    Example:
      >>> name_hits("query", "layers_0/attn/query/kernel"), name_hits("query/kernel", "attn/query/kernel")
      (True, True)
      >>> name_hits("head", "subhead/kernel"), name_hits("attn", "layers_0/attn/query/kernel")
      (False, False)
    """
    wanted, parts = components(name), components(path)
    return _ends(parts[:-1], wanted) or _ends(parts, wanted)


def inside(name: str, path: str) -> bool:
    """Whether a parameter is what `name` names, or lies anywhere below it.

    >>> inside("attn", "layers_0/attn/query/kernel"), inside("attn", "layers_0/cross_attn/query/kernel")
    (True, False)
    """
    wanted, parts = components(name), components(path)
    return any(parts[start : start + len(wanted)] == wanted for start in range(len(parts)))


def _ends(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return parts[len(parts) - len(wanted) :] == wanted if len(wanted) <= len(parts) else False


@lru_cache(maxsize=65536)
def spellings(path: str) -> tuple[str, ...]:
    """Every way a regex may spell a parameter.

    Its path or its module's, joined with `/` or (as PEFT does) with `.`, with or without a leading `params`.

    >>> spellings("params/mlp/kernel")[:4]
    ('params/mlp/kernel', 'params.mlp.kernel', 'mlp/kernel', 'mlp.kernel')
    """
    forms = []
    for form in (path, path.rpartition("/")[0]):
        for bare in (form, form.removeprefix("params/")):
            forms += [bare, bare.replace("/", ".")]
    return tuple(dict.fromkeys(forms))


def regex_hits(regex: str, path: str) -> bool:
    """Whether a regex matches a whole spelling of a parameter (`re.fullmatch`, as in PEFT).

    >>> regex_hits(r".*\\.(query|value)", "params/layers_0/attn/query/kernel")
    True
    """
    return any(safe.fullmatch(regex, form) for form in spellings(path))


def hits(wanted: str | Collection[str], path: str) -> bool:
    """Whether a regex (one string) or any of several names selects a parameter."""
    if isinstance(wanted, str):
        return regex_hits(wanted, path)
    return any(name_hits(name, path) for name in wanted)


def layer_number(path: str, patterns: Iterable[str] = ()) -> int | None:
    """Number of the layer a parameter belongs to, or None.

    Without patterns it is the first numbered component before the parameter itself: `3` in
    `layers_3/attn/query/kernel`, in `layers/3/attn/query/kernel` and in `Block_3/Dense_0/kernel`. With patterns, only
    a number that follows one of these names counts (`encoder_0/block_3/kernel` with `block`).

    Differs from PEFT, which needs two components before the number and knows only the form `layers.3`.

    Example:
      >>> layer_number("layers_3/kernel"), layer_number("encoder_0/block/3/kernel", ["block"]), layer_number("w")
      (3, 3, None)
    """
    path = "/".join(components(path))
    names = ["/".join(components(pattern)) for pattern in patterns]
    searches = [re.compile(rf"(?:^|/){re.escape(name)}[/_]?(\d+)(?=/)") for name in names] or [_NUMBERED]
    found = (search.search(path) for search in searches)
    return next((int(match[1]) for match in found if match), None)


def alike(path: str) -> str:
    """A path with `*` for the number of its layer: the same for a parameter in all layers.

    >>> alike("layers_3/attn/query/kernel"), alike("model.layers.3.mlp.0.weight"), alike("head/kernel")
    ('layers_*/attn/query/kernel', 'model.layers.*.mlp.0.weight', 'head/kernel')
    """
    found = _NUMBERED.search("/".join(components(path)))
    return path if found is None else f"{path[: found.start(1)]}*{path[found.end(1) :]}"


def pattern_hits(key: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` applies to a parameter.

    As in PEFT, the key is a regex that must match from a component boundary to the end of the module's name.
    Here the parameter's own path counts too, and `/` is as good as `.`.

    Example:
      >>> pattern_hits("query", "layers_0/query/kernel"), pattern_hits("layers.1.query", "layers/11/query/kernel")
      (True, False)
    """
    return any(safe.fullmatch(rf"(.*[./])?({key})", form) for form in spellings(path))


def lookup(patterns: Iterable[tuple[str, Any]], path: str) -> tuple[str, Any] | None:
    """First pattern, in order, that applies to a parameter, with its value; the order decides, as in PEFT.

    >>> lookup([("layers_1/query", 4), ("query", 2)], "layers_1/query/kernel")
    ('layers_1/query', 4)
    """
    return next(((key, value) for key, value in patterns if pattern_hits(key, path)), None)
