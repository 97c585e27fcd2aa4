"""Death at any moment, in this process: from some change of files on nothing is changed, as after kill -9."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_jax import publish

CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate")


class Killed(BaseException):
    """Not even `finally` changes a file after it."""


def killed_at(moment: int, run: Callable[[], Any]) -> bool:
    """Call a function in which the change of number `moment`, and all after it, do not happen; whether it died."""
    count = 0

    def dying(usual: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return usual(*args, **options)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(publish, "_exchanged", dying(publish._exchanged))
        patch.setattr(Path, "open", dying(Path.open))
        try:
            run()
        except Killed:
            return True
    return False
