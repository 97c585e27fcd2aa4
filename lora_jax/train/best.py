"""The best evaluation of a run so far, and whether there has been none better for too long: both from its metrics."""

from collections.abc import Iterable, Mapping
from typing import Any


class Best:
    """What the evaluations in the metrics of a run say; nothing else is remembered, so that a resumed run agrees.

    Args:
      records: of `metrics.jsonl`; those with `eval_loss` are evaluations.
      patience: evaluations without a better one after which the run is over; None for any number.

    Attributes:
      step: of the best evaluation; None before the first.
      loss: of that evaluation.

    Example:
      >>> best = Best([{"step": 5, "eval_loss": 2.0}], patience=1)
      >>> best.seen(10, 1.5), best.over, best.seen(15, 1.7), best.over, best.step
      (True, False, False, True, 10)
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = (), patience: int | None = None):
        self.step: int | None = None
        self.loss = float("inf")
        self._patience, self._worse = patience, 0
        for record in records:
            if "eval_loss" in record:
                self.seen(record["step"], record["eval_loss"])

    def seen(self, step: int, loss: float) -> bool:
        """Note an evaluation; whether it is the best so far."""
        better = loss < self.loss
        if better:
            self.step, self.loss = step, loss
        self._worse = 0 if better else self._worse + 1
        return better

    @property
    def over(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self._worse >= self._patience
