"""How fast texts were made."""

from typing import Any

from lora_jax.generate.generator import Continuation


class Speed:
    """Tokens, seconds until the first, and tokens per second after them.

    Example:
      >>> Speed().said()
      '0 tokens, the first after 0.0 s'
    """

    def __init__(self) -> None:
        self.tokens, self.waited = 0, 0.0
        self.rate: float | None = None

    def add(self, continuation: Continuation, count: int = 1) -> None:
        """Count the first `count` texts of one more; the rate is that of the last, when programs are compiled."""
        self.waited = self.waited or continuation.waited
        self.tokens += sum(len(answer.tokens) for answer in continuation.answers[:count])
        self.rate = continuation.rate or self.rate

    def said(self) -> str:
        """In a line."""
        rate = f", then {self.rate:.1f} tokens/s" if self.rate else ""
        return f"{self.tokens} tokens, the first after {self.waited:.1f} s{rate}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tokens": self.tokens, "seconds_to_first": self.waited, "tokens_per_second": self.rate}
