"""Lazy faces: a package whose public names are imported at their first use, as in SPEC 1 of scientific Python."""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class _Face(ModuleType):
    """A package in which a function may have the name of the module that holds it: `lora_jax.merge` is the function.

    Python sets a package's attribute to every submodule it imports, which would hide the function.
    """

    _homes: Mapping[str, str]

    def __setattr__(self, name: str, value: Any) -> None:
        hidden = isinstance(value, ModuleType) and self._homes.get(name, value.__name__) != value.__name__
        if not hidden:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in self._homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, attribute = self._homes[name].partition(":")
        value = getattr(import_module(module), attribute) if attribute else import_module(module)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def face(package: str, names: Mapping[str, str]) -> None:
    """Make a package import its public names when they are first used, and list them in its `__all__`.

    Args:
      package: `__name__` of the package.
      names: by module, the names that it holds, separated by spaces. A module without names is public itself.

    Example:
      >>> import lora_jax as lora
      >>> "merge" in lora.__all__, lora.merge.__name__
      (True, 'merge')
    """
    homes = {}
    for module, held in names.items():
        homes |= {name: f"{module}:{name}" for name in held.split()} or {module.rpartition(".")[2]: module}
    module = sys.modules[package]
    module.__class__ = _Face
    module.__dict__.update(_homes=homes, __all__=sorted(homes))
