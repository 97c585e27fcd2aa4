"""Which base an adapter names, beside the one it is put on, as far as names and notes of files tell.

The files of most adapters have nothing of the base but its name. Names prove little: copies of one model have several,
and a directory none. So another name is a warning, and only what files note themselves is refused.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Identity(NamedTuple):
    """A repository of the Hub, and the commit of it."""

    repository: str
    commit: str


def identity(base: Path) -> Identity | None:
    """Which repository and commit a directory is, if it lies in the Hub's cache; others do not tell.

    >>> identity(Path("/cache/models--org--base/snapshots/1234"))
    Identity(repository='org/base', commit='1234')
    """
    found = _IN_CACHE.search(base.expanduser().resolve().as_posix())
    return Identity(f"{found['owner']}/{found['name']}", found["commit"]) if found else None


def warn_of_other_base(where: str, config: Mapping[str, Any], base: Path) -> None:
    """Warn if an adapter's config names another repository or commit than the base is.

    Args:
      where: the adapter's file.
      config: its `adapter_config.json`.
      base: the base's directory.
    """
    given, named, revision = identity(base), config.get("base_model_name_or_path"), config.get("revision")
    if given is None or not isinstance(named, str) or not _REPOSITORY.fullmatch(named) or Path(named).exists():
        return
    other_commit = isinstance(revision, str) and _COMMIT.fullmatch(revision) and revision != given.commit
    if named.lower() != given.repository.lower():
        _warn(where, named, f"{given.repository}")
    elif other_commit:
        _warn(where, f"{named} at {revision}", f"its commit {given.commit}")


def _warn(where: str, named: str, given: str) -> None:
    warnings.warn(
        f"{where} names {named} as its base, and this is {given}. Where their weights differ, what the adapter changes "
        "means nothing: take the base that it was trained on.",
        stacklevel=4,
    )
