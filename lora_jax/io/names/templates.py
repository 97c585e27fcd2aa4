"""Templates: names with braces in them, which a map of names is written in."""

import re
from collections.abc import Mapping
from functools import lru_cache

_HOLE = re.compile(r"\{(\w+)\}")
NUMBERS = ("i", "j")
"""What stands for numbers; any other name in braces is part of one component."""


def bare(path: str) -> str:
    """The path without the collection `params`."""
    return path.removeprefix("params/")


def match(template: str, path: str) -> dict[str, str] | None:
    """What stands in the braces of a template, if it is for this path.

    >>> match("layers_{i}/{name}/kernel", "layers_3/query/kernel"), match("layers_{i}/q", "layers_a/q")
    ({'i': '3', 'name': 'query'}, None)
    """
    found = _compiled(template).fullmatch(path)
    return None if found is None else found.groupdict()


@lru_cache(maxsize=4096)
def _compiled(template: str) -> re.Pattern[str]:
    pattern, end, seen = "", 0, set()
    for hole in _HOLE.finditer(template):
        name = hole[1]
        kind = r"\d+" if name in NUMBERS else r"[^/]+"
        pattern += re.escape(template[end : hole.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{kind})"
        seen.add(name)
        end = hole.end()
    return re.compile(pattern + re.escape(template[end:]))


def holes(templates: tuple[str, ...]) -> list[str]:
    """Names in braces, in the order in which they come first."""
    return list(dict.fromkeys(_HOLE.findall("".join(templates))))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its braces filled.

    >>> filled("layers.{i}.{name}", {"i": "3", "name": "q"})
    'layers.3.q'
    """
    return _HOLE.sub(lambda hole: values[hole[1]], template)
