"""How texts are continued: the options that verbs share which do."""

from dataclasses import dataclass

from lora_jax.generate.sampling import Sampling
from lora_jax.train.options import require


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen."""

    max_tokens: int = 256
    """How many tokens may follow a prompt."""
    temperature: float = 0.0
    """0 takes the most probable token; above, tokens are drawn."""
    top_k: int = 0
    """Draw from so many of the most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most probable tokens whose probabilities sum to this."""
    min_p: float = 0.0
    """Leave out tokens that are less probable than this share of the most probable one."""
    seed: int = 0
    """For drawing."""

    @property
    def how(self) -> Sampling:
        """The options as the library takes them.

        Raises:
          LoraError: one is out of range.
        """
        require("max_tokens", self.max_tokens, least=1)
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        ).checked()  # fmt: skip
