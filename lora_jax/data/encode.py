"""`encode`: records as tokens, with those marked that are trained on; what is cut off or left out is counted."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_jax.data.counts import EncodeCounts
from lora_jax.data.errors import BadLine, DataError
from lora_jax.data.example import Example, Examples, Options, Pair, texts_of
from lora_jax.data.marks import Marked, marks
from lora_jax.data.records import Record, Records
from lora_jax.errors import listed
from lora_jax.text import Tokenizer
from lora_jax.text.chat import inside

_AT_ONCE = 512  # texts that are encoded together, by several threads


def encode(
    records: Records,
    tokenizer: Tokenizer,
    options: Options | None = None,
    *,
    labels: Sequence[str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """Encode examples.

    Of `text` everything is trained on, of the other kinds the answers. Conversations are written by the chat template,
    and so are prompts and completions if there is one. Other texts begin with the token that begins a text, if the
    tokenizer says that they do, and end with the one that ends it; each is there once, and the end is trained on.

    Args:
      records: of `read`.
      tokenizer: of `lora_jax.text.read_tokenizer`.
      options: the length of examples and what is trained on.
      labels: names of the classes, by their numbers; by default those that are found, sorted. For examples to evaluate
        on, give `labels` of those to train on.
      progress: is told how many records are done, now and then.

    Raises:
      DataError: no example is left; there is no chat template for conversations, or it does not tell answers from the
        rest; an example has to be left out, and `options.strict` is set.

    Example:
      >>> import pathlib, tempfile
      >>> from lora_jax.data import marked, read_file
      >>> from lora_jax.text import byte_tokenizer
      >>> path = pathlib.Path(tempfile.mkdtemp(), "data.jsonl")
      >>> _ = path.write_text('{"prompt": "1 + 1 =", "completion": " 2"}')
      >>> examples = encode(read_file(path), byte_tokenizer())
      >>> print(marked(examples[0], byte_tokenizer()))
      1 + 1 =[ 2<|endoftext|>]
    """
    options = options or Options()
    counts = EncodeCounts(records.file)
    named = _labels(records, labels)
    encoder = _Encoder(records, tokenizer, options, counts, {name: number for number, name in enumerate(named)})
    items = tuple(encoder.examples(progress))
    if not items:
        first = f" First of all: {counts.notes[0]}" if counts.notes else ""
        raise DataError(f"none of the {len(records):,} examples of {records.file} can be trained on.{first}")
    flat = [each for item in items for each in texts_of(item)]
    counts.examples, counts.longest = len(items), max(map(len, flat))
    counts.tokens, counts.trained = sum(map(len, flat)), sum(int(each.trained.sum()) for each in flat)
    return Examples(records.kind, items, counts, named)


def _labels(records: Records, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes by their numbers."""
    if records.kind != "label":
        return ()
    if given is not None:
        return tuple(given)
    found = {record.values["label"] for record in records}
    if len({type(each) for each in found}) > 1:
        shown = listed([repr(each) for each in sorted(found, key=str)])
        raise DataError(f"{records.file}: labels are texts in some lines and numbers in others: {shown}")
    return tuple(str(each) for each in sorted(found))


class _Ends(NamedTuple):
    """Tokens before and after a text."""

    before: Sequence[int]
    after: Sequence[int]


def _ends(tokenizer: Tokenizer, classify: bool) -> _Ends:
    """What stands around a text: for classification what the tokenizer itself puts there."""
    if classify:
        whole, inner = tokenizer.encode("a", special=True), tokenizer.encode("a")
        begin = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        return _Ends(whole[:begin], whole[begin + len(inner) :])
    before = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return _Ends(before, [] if tokenizer.eos_id is None else [tokenizer.eos_id])


class _Encoder:
    """Examples of one file, one after the other."""

    def __init__(
        self, records: Records, tokenizer: Tokenizer, options: Options, counts: EncodeCounts, labels: dict[str, int]
    ):
        self._records, self._tokenizer, self._options, self._counts = records, tokenizer, options, counts
        self._labels, self._ends = labels, _ends(tokenizer, records.kind == "label")

    def examples(self, progress: Callable[[int], None]) -> Iterator[Any]:
        """What is left of the records, as examples or pairs."""
        for start in range(0, len(self._records), _AT_ONCE):
            found: list[tuple[Record, tuple[Marked, ...]]] = []
            for record in self._records[start : start + _AT_ONCE]:
                try:
                    found.append((record, marks(record, self._records, self._tokenizer, self._options)))
                except BadLine as error:
                    self._refuse(record, error)
            texts = [marked.text for _, several in found for marked in several]
            encodings = iter(self._tokenizer.backend.encode_batch(texts, add_special_tokens=False))
            for record, several in found:
                try:
                    yield from self._finished(record, [(marked, next(encodings)) for marked in several])
                except BadLine as error:
                    self._refuse(record, error)
            progress(min(start + _AT_ONCE, len(self._records)))

    def _refuse(self, record: Record, error: BadLine) -> None:
        self._counts.refuse(record.line, error, self._options.strict)

    def _finished(self, record: Record, several: list[tuple[Marked, Any]]) -> list[Any]:
        parts = [self._with_ends(marked, encoding) for marked, encoding in several]
        if self._records.kind == "label":
            return [self._labelled(record, *parts[0])]
        if self._records.kind == "text":
            return self._split(record, *parts[0])
        cut = [self._cut(record, *part) for part in parts]
        return [Pair(*cut)] if self._records.kind == "preference" else cut

    def _with_ends(self, marked: Marked, encoding: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and targets of a whole text."""
        ids, before, after = encoding.ids, *self._ends
        spans = [(0, len(marked.text))] if marked.spans is None else marked.spans
        begin = before if marked.begins and list(ids[: len(before)]) != list(before) else []
        ended = bool(ids) and ids[-1] in self._tokenizer.eos_ids and self._records.kind != "label"
        end = after if marked.ends and not ended else []
        tokens = np.array([*begin, *ids, *end], np.int32)
        trained = np.concatenate([np.zeros(len(begin), bool), inside(encoding.offsets, spans), np.ones(len(end), bool)])
        trained[:1] = False
        return tokens, trained

    def _cut(self, record: Record, tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> Example:
        """What fits of an example."""
        length = self._options.length
        if not trained.any():
            raise BadLine("no token to train on", f"it has {len(tokens)} tokens")
        if not trained[:length].any():
            first = int(np.argmax(trained))
            raise BadLine(
                f"nothing to train on in {length} tokens", f"the first that is trained on is number {first + 1}"
            )
        if len(tokens) > length:
            self._counts.truncated += 1
            self._counts.cut_off += len(tokens) - length
        else:
            self._counts.endless += not np.isin(tokens[trained], self._tokenizer.eos_ids).any()
        return Example(tokens[:length].copy(), trained[:length].copy(), record.line)

    def _split(self, record: Record, tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> list[Example]:
        """A text as examples, each from the last token of that before: every token but the first is a target once."""
        length = self._options.length
        if len(tokens) < 2:
            raise BadLine("no token to train on", f"it has {len(tokens)} tokens")
        self._counts.split += len(tokens) > length
        parts = []
        for begin in range(0, len(tokens) - 1, length - 1):
            targets = trained[begin : begin + length].copy()
            targets[0] = False
            parts.append(Example(tokens[begin : begin + length].copy(), targets, record.line))
        return parts

    def _labelled(self, record: Record, tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> Example:
        """A text and its class; what is cut off a long one is before the tokens that end it."""
        name = str(record.values["label"])
        if name not in self._labels:
            raise BadLine("a label that is none of the classes", f"{name!r}; there are {listed(list(self._labels))}")
        length, end = self._options.length, len(self._ends.after)
        if len(tokens) > length:
            self._counts.truncated += 1
            self._counts.cut_off += len(tokens) - length
            tokens = np.concatenate([tokens[: length - end], tokens[len(tokens) - end :]])
        return Example(tokens, np.zeros(len(tokens), bool), record.line, self._labels[name])
