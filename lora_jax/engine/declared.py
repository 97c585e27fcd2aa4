"""Declared products: functions of users of which it is known that they are a product of an input and a kernel.

A declared function is called through a `jax.jit` with a name of its own, by which its equation is recognised. The
declaration holds for an equation only if tracing the function with the equation's shapes gives the equation's program:
under `jax.vmap` it may have become another.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from itertools import count
from string import ascii_uppercase
from typing import Any, NamedTuple

import jax

from lora_jax.errors import ConfigError


class Letters(NamedTuple):
    """A letter for every axis of the input, the kernel and the result."""

    x: str
    kernel: str
    out: str


@dataclass(frozen=True)
class Declaration:
    """What has been declared of a function.

    Attributes:
      fn: the function `fn(x, kernel, *others)`.
      letters: of its axes; the input and the result may begin with an ellipsis.
    """

    fn: Callable[..., Any]
    letters: Letters

    @cache  # noqa: B019  # Declarations stay for good.
    def program(self, shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> str | None:
        """The function's program, as text, for operands of these shapes and dtypes; None if it does not take them."""
        try:
            return _shown(jax.make_jaxpr(self.fn)(*(jax.ShapeDtypeStruct(*each) for each in shapes)))
        except (TypeError, ValueError):
            return None

    def expanded(self, ranks: tuple[int, ...]) -> Letters | None:
        """The letters with others in place of the ellipses; None if the ranks are not these."""
        more = [rank - len(text.replace("...", "")) for rank, text in zip(ranks, self.letters, strict=True)]
        wanted = {extra for extra, text in zip(more, self.letters, strict=True) if "..." in text}
        if any(extra and "..." not in text for extra, text in zip(more, self.letters, strict=True)):
            return None
        if len(wanted) > 1 or min(wanted, default=0) < 0:
            return None
        free = iter([letter for letter in ascii_uppercase if letter not in "".join(self.letters)])
        axes = "".join(next(free) for _ in range(min(wanted, default=0)))
        return Letters(*(text.replace("...", axes) for text in self.letters))


_DECLARED: dict[str, Declaration] = {}
_NUMBERS = count()


def parsed(spec: str) -> Letters:
    """The letters of a specification such as `"...k,kn->...n"`.

    Raises:
      ConfigError: it is none of a product of two operands.
    """
    match = re.fullmatch(r"((?:\.\.\.)?[a-zA-Z]*),([a-zA-Z]*)->((?:\.\.\.)?[a-zA-Z]*)", spec.replace(" ", ""))
    letters = Letters(*match.groups()) if match else None
    if letters is None or not letters.kernel or ("..." in letters.x) != ("..." in letters.out):
        raise ConfigError(
            f"{spec!r} is no product of an input and a kernel: write it as jax.numpy.einsum does, '...k,kn->...n', "
            "with an ellipsis in both the input and the result or in neither"
        )
    names = [text.replace("...", "") for text in letters]
    twice = [text for text in names if len({*text}) < len(text)]
    summed = {*names[0]} ^ {*names[1]}
    if twice or not {*names[2]} <= {*names[0], *names[1]} or not summed <= {*names[2]}:
        raise ConfigError(
            f"{spec!r}: every axis is in two of input, kernel and result, or in all three, and in each once"
        )
    return letters


def declare(fn: Callable[..., Any], letters: Letters) -> Callable[..., Any]:
    """The function, recognised as a product wherever a program calls it."""

    @cache
    def compiled(static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        def run(x: Any, kernel: Any, *others: Any) -> Any:
            return fn(x, kernel, *others, **dict(static))

        run.__name__ = f"{getattr(fn, '__name__', 'kernel')}_lora_linear_{next(_NUMBERS)}"
        _DECLARED[run.__name__] = Declaration(run, letters)
        return jax.jit(run)

    @wraps(fn)
    def declared_fn(x: Any, kernel: Any, *others: Any, **static: Any) -> Any:
        return compiled(tuple(sorted(static.items())))(x, kernel, *others)

    return declared_fn


def declared(eqn: Any) -> Letters | None:
    """A letter for every axis of an equation's first two operands and of its result, if that is declared of it."""
    found = _DECLARED.get(eqn.params.get("name", "")) if eqn.primitive.name in ("jit", "pjit") else None
    if found is None or len(eqn.outvars) != 1 or len(eqn.invars) < 2:
        return None
    letters = found.expanded(tuple(len(atom.aval.shape) for atom in (*eqn.invars[:2], *eqn.outvars)))
    shapes = tuple((atom.aval.shape, atom.aval.dtype) for atom in eqn.invars)
    return letters if found.program(shapes) == _shown(eqn.params["jaxpr"]) else None


def operation(eqn: Any) -> str:
    """What to call an equation's operation: its primitive, or the declared function."""
    name = eqn.params.get("name", "")
    return name.rpartition("_lora_linear_")[0] if name in _DECLARED else eqn.primitive.name


def _shown(program: Any) -> str:
    """A program as text, without the addresses of functions."""
    return re.sub(r"\bat 0x[0-9a-f]+|id=\d+", "", str(program))
