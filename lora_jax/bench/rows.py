"""One line of a benchmark: a mode at a rank, and how its numbers are spelled."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode at one rank, of one case, on one number of tokens.

    Attributes:
      case: the weight or model.
      tokens: number of tokens.
      examples: what they are cut into; the tokens of an example meet the same adapter.
      mode: `base`, `adapter`, `separate`, `merged` or `routed`.
      form: how the thin products are carried out: `factored` or `merged` of separate, `rows`, `mask` or `blocks` of
        routed, several with `and` between them; else empty.
      rank: of the adapters; None for the base.
      adapters: number in the bank; None where there is none.
      seconds: median time of a call.
      ratio: median, over the rounds, of this time divided by that of the base in the same round.
      ratio_quartiles: the lower and the upper one of that.
      flops: operations, as XLA counts them; None where a backend does not say, as the next two.
      bytes: bytes read and written, as XLA counts them: by every operation that is left, as though there were no
        caches.
      temporary_bytes: memory allocated beside arguments and results.
      times: seconds of every round.
    """

    case: str
    tokens: int
    examples: int
    mode: str
    form: str
    rank: int | None
    adapters: int | None
    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    flops: int | None
    bytes: int | None
    temporary_bytes: int | None
    times: tuple[float, ...]


def digits_text(ratio: float) -> str:
    """A ratio with three digits.

    >>> digits_text(1.234), digits_text(12.34)
    ('1.23', '12.3')
    """
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def batch_text(tokens: int, examples: int) -> str:
    """What a batch holds, in words.

    Example:
      >>> batch_text(64, 64), batch_text(64, 1)
      ('64 tokens', '64 tokens in 1 example')
    """
    cut = "" if examples == tokens else f" in {counted(examples, 'example')}"
    return counted(tokens, "token") + cut


def counted(count: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """A time with its unit.

    Example:
      >>> seconds_text(0.00123), seconds_text(4.2e-5)
      ('1.23 ms', '42.0 µs')
    """
    size, unit = next(((size, unit) for size, unit in ((1, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs"))
    return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}"
