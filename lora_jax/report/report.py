"""Reports: results that print as a table, and give their numbers as a dictionary or as JSON."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from os import PathLike, fspath
from typing import Any

import numpy as np

from lora_jax.report.tables import Table, Tables, render


class Printed(ABC):
    """An object that prints as a table: in Python, in notebooks, and with rich."""

    @abstractmethod
    def table(self) -> Table | Tables:
        """What is printed."""

    def __rich__(self) -> Table | Tables:
        return self.table()

    def __repr__(self) -> str:
        return render(self.table())


class Report(Printed):
    """A dataclass of results: a table when printed, and its numbers as a dictionary or as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """Its attributes by name, rows too, as numbers, texts, lists and dictionaries.

        Arrays become lists, and numbers that are not finite None, as JSON has none.
        """
        return plain_value(self)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)


def plain_value(value: Any) -> Any:
    """A value made of what JSON knows; a dataclass is a dictionary of its fields and properties.

    >>> plain_value({"shape": (2, 3), "ratio": float("nan"), "values": np.float32([0.5, 1])})
    {'shape': [2, 3], 'ratio': None, 'values': [0.5, 1.0]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return plain_value(value.tolist())
    if is_dataclass(value):
        return {name: plain_value(getattr(value, name)) for name in _public(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_value(each) for key, each in value.items()}
    return [plain_value(each) for each in value]


def _public(value: Any) -> list[str]:
    """Names of the fields of a dataclass, and of its properties."""
    classes = reversed(type(value).__mro__)
    properties = [name for each in classes for name, held in vars(each).items() if isinstance(held, property)]
    names = [each.name for each in fields(value)] + properties
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]
