"""SentencePiece vocabularies in GGUF files, as Llama 2 has them: pieces with scores, and bytes for the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.errors import CheckpointError

_SPACE = "▁"


def sentencepiece(given: Mapping[str, Any]) -> Any:
    """The tokenizer of such a vocabulary, as the package tokenizers runs it and transformers builds it.

    Args:
      given: settings `tokenizer.ggml.*` of the file, without that prefix.

    Raises:
      CheckpointError: pieces or their scores are missing.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Metaspace

    pieces, scores = given.get("tokens", []), given.get("scores", [])
    if not pieces or len(pieces) != len(scores):
        raise CheckpointError(
            f"the file has {len(pieces)} pieces in tokenizer.ggml.tokens and {len(scores)} scores in "
            "tokenizer.ggml.scores: convert it again"
        )
    unknown = given.get("unknown_token_id")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend: Any = Tokenizer(
        BPE(
            vocabulary, merges(pieces, scores), unk_token=None if unknown is None else pieces[unknown], fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    prefixed = given.get("add_space_prefix", True)
    backend.pre_tokenizer = Metaspace(_SPACE, prepend_scheme="first" if prefixed else "never", split=False)
    steps: list[Any] = [Replace(_SPACE, " "), ByteFallback(), Fuse()]
    backend.decoder = Sequence([*steps, Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def merges(pieces: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Which pieces become one, the first ones first: all pairs of pieces that make another, by its score.

    >>> merges(["a", "b", "ab", "aba"], [0.0, 0.0, -1.0, -2.0])
    [('a', 'b'), ('ab', 'a')]
    """
    number, found = {piece: index for index, piece in enumerate(pieces)}, []
    for piece, score in zip(pieces, scores, strict=True):
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in number and pair[1] in number]
        found += [(pair, score) for pair in sorted(known, key=lambda pair: (number[pair[0]], number[pair[1]]))]
    # As transformers sorts them: of one score those with longer parts first, and else as they were found.
    found.sort(key=lambda each: (each[1], len(each[0][0]), len(each[0][1])), reverse=True)
    return [pair for pair, _ in found]
