"""Reading data: the kinds of lines, what is wrong with bad ones, and which examples are held out."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import DataError, Dataset, Records, read, read_file
from lora_jax.errors import LoraError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
LINES: dict[str, dict[str, Any]] = {
    "text": {"text": "a b"},
    "completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": CHAT, "tools": [{"type": "function"}]},
    "label": {"input": "a", "label": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


def write(folder: Path, *lines: Any, name: str = "data.jsonl") -> Path:
    """A file: objects as JSON, bytes and texts as they are."""
    rows = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else dumped(line) for line in lines
    ]
    (folder / name).write_bytes(b"\n".join(rows) + b"\n")
    return folder / name


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def reasons(records: Records) -> dict[str, int]:
    return dict(records.counts.bad)


@pytest.mark.parametrize("kind", LINES)
def test_the_kind_is_told_by_the_keys(tmp_path: Path, kind: str) -> None:
    found = read_file(write(tmp_path, {**LINES[kind], "id": 7}, LINES[kind]))
    assert (found.kind, len(found), found.counts.kept, reasons(found)) == (kind, 2, 2, {})
    assert dict(found[0].values) == LINES[kind]
    assert [record.line for record in found] == [1, 2]


def test_keys_of_the_file_may_be_others(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "Q", "answer": "A", "text": "both"})
    found = read_file(path, keys={"prompt": "question", "completion": "answer"})
    assert (found.kind, dict(found[0].values)) == ("completion", {"prompt": "Q", "completion": "A"})
    assert read_file(path).kind == "text"
    reviews = write(tmp_path, {"text": "good", "label": 1}, name="reviews.jsonl")
    assert read_file(reviews, keys={"input": "text"}).kind == "label"


def test_prompts_may_be_messages(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]})
    assert read_file(path).kind == "preference"


BAD: dict[str, tuple[Any, str]] = {
    "half": ('{"prompt": "a", ', "not JSON"),
    "array": ("[1]", "not an object"),
    "number": ("7", "not an object"),
    "latin1": (b'{"prompt": "\xe4", "completion": "b"}', "not UTF-8"),
    "deep": ("[" * 100_000, "not JSON"),
    "digits": ('{"prompt": ' + "9" * 5000 + "}", "not JSON"),
    "missing": ({"prompt": "a"}, "no 'completion'"),
    "null": ({"prompt": "a", "completion": None}, "no 'completion'"),
    "type": ({"prompt": "a", "completion": 7}, "'completion' is no text or messages"),
    "empty": ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    "mixed": ({"prompt": "a", "completion": CHAT}, "texts and messages"),
    "surrogate": ('{"prompt": "\\ud83d", "completion": "b"}', "half a character"),
    "tools": ({"prompt": "a", "completion": "b", "tools": "x"}, "tools are not JSON"),
    "tool": ({"prompt": "a", "completion": "b", "tools": {"x": 1}}, "tools are no list of objects"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_counted_and_named(tmp_path: Path, case: str) -> None:
    line, reason = BAD[case]
    path = write(tmp_path, LINES["completion"], "", line, LINES["completion"])
    found = read_file(path)
    assert reasons(found) == {reason: 1}
    assert (found.counts.read, found.counts.kept, [record.line for record in found]) == (3, 2, [1, 4])
    assert found.counts.notes[0].startswith(f"{path}:3: {reason}")
    assert reason in repr(found.counts)
    with pytest.raises(DataError, match=r":3: .*Correct the line"):
        read_file(path, strict=True)


MESSAGES: dict[str, tuple[Any, str]] = {
    "text": ("Hi", "'messages' is no list of messages"),
    "texts": (["Hi"], "'messages' is no list of messages"),
    "none": ([], "'messages' is empty"),
    "role": ([{"content": "Hi"}], "a message without a role"),
    "number": ([{"role": "user", "content": 7}], "a message whose content is no text"),
    "image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a message whose content is no text"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_bad_messages(tmp_path: Path, case: str) -> None:
    value, reason = MESSAGES[case]
    assert reasons(read_file(write(tmp_path, LINES["messages"], {"messages": value}))) == {reason: 1}


def test_content_may_be_parts_of_text_or_nothing_beside_a_call(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": None}]
    assert reasons(read_file(write(tmp_path, {"messages": parts}))) == {}


def test_tools_may_be_json_in_a_text(tmp_path: Path) -> None:
    lines = [{"messages": CHAT, "tools": tools} for tools in ('[{"name": "f"}]', "", None, [])]
    found = read_file(write(tmp_path, *lines))
    assert [record.values.get("tools") for record in found] == [[{"name": "f"}], None, None, None]


USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "Y"), ("assistant", "N"))
)
PREFERENCES: dict[str, dict[str, Any]] = {
    "prompt and answers": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "conversations": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "conversations and a prompt": {"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]},
    "a text and messages": {"prompt": "Q", "chosen": [YES], "rejected": [NO]},
}


@pytest.mark.parametrize("form", PREFERENCES)
def test_the_prompt_of_preferences_has_several_forms(tmp_path: Path, form: str) -> None:
    found = read_file(write(tmp_path, PREFERENCES[form]))
    assert (found.kind, dict(found[0].values)) == ("preference", PREFERENCES["prompt and answers"])


def test_longer_conversations_share_what_they_begin_with(tmp_path: Path) -> None:
    line = {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}
    values = read_file(write(tmp_path, line))[0].values
    assert (values["prompt"], values["chosen"], values["rejected"]) == ([USER, YES, USER], [YES], [NO])


UNPAIRED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"chosen": "Y", "rejected": "N"}, "no 'prompt'"),
    "nothing shared": ({"chosen": [YES], "rejected": [NO]}, "no 'prompt'"),
    "another prompt": ({**PREFERENCES["conversations"], "prompt": "R"}, "'prompt' is not what the answers begin with"),
    "a number": ({**PREFERENCES["conversations"], "prompt": 7}, "'prompt' is no text or messages"),
    "mixed": ({"prompt": "Q", "chosen": [YES], "rejected": "N"}, "texts and messages"),
    "messages and texts": ({"prompt": [USER], "chosen": "Y", "rejected": "N"}, "texts and messages"),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_preferences_without_a_prompt(tmp_path: Path, case: str) -> None:
    line, reason = UNPAIRED[case]
    assert reasons(read_file(write(tmp_path, LINES["preference"], line))) == {reason: 1}


def test_keys_that_are_not_read_are_told(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"instruction": "a", "output": "b", "input": "c"}, {"instruction": "a", "output": "b", "id": 1}
    )
    counts = read_file(path, keys={"prompt": "instruction", "completion": "output"}).counts
    assert counts.passed_over == ("id", "input")
    assert "Keys that are not read: 'id', 'input'" in repr(counts)
    assert read_file(write(tmp_path, LINES["messages"])).counts.passed_over == ()


def test_labels_are_texts_or_whole_numbers(tmp_path: Path) -> None:
    lines = [{"input": "a", "label": label} for label in ("x", True, 1.5, ["x"])]
    assert reasons(read_file(write(tmp_path, *lines))) == {"'label' is no text and no whole number": 3}


def test_byte_order_mark_carriage_returns_and_blank_lines(tmp_path: Path) -> None:
    line = dumped(LINES["text"])
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + '{"text": "ü\u2028ü"}'.encode() + b"\r\n\n" + line)
    found = read_file(path)
    assert (found.counts.read, reasons(found)) == (3, {})
    assert [record.line for record in found] == [1, 4, 6]
    assert found[1].values["text"] == "ü\u2028ü"


def test_the_first_line_that_can_be_read_tells_the_kind(tmp_path: Path) -> None:
    found = read_file(write(tmp_path, "oops", {"other": 1}, LINES["label"], LINES["text"]))
    assert (found.kind, reasons(found)) == ("label", {"not JSON": 1, "keys of no kind": 1, "no 'input'": 1})


FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"\n \n", "holds no example in 0 lines"),
    "bad.jsonl": (b"x\ny\n", r"holds no example in 2 lines.*bad\.jsonl:1: not JSON"),
    "array.json": (b'[\n{"text": "a"}]', r"array\.json:1: the file is a JSON array.*jq -c"),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
    "packed.jsonl": (b"\x1f\x8b\x08\x00", "compressed with gzip"),
    "table.parquet": (b"PAR1abc", "Parquet"),
    "both.jsonl": (
        dumped({**LINES["preference"], **LINES["messages"]}),
        r"both\.jsonl:1: .*'messages' and of 'preference'",
    ),
    "empty.txt": (b" \n", "is empty"),
    "table.csv": (b"prompt,completion\na,b\n", r"a table by its name.*csv\.DictReader.*table\.jsonl"),
    "lines.txt": (b'\xef\xbb\xbf{"text": "a"}\n', r"begins with a JSON object: name it lines\.jsonl"),
    "latin.txt": (b"a\n\xe4\n", r"latin\.txt:2: not UTF-8: byte 0xe4"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_file(tmp_path / name)
    assert isinstance(raised.value, LoraError)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.jsonl", "nothing"), (Path("/dev/null"), "a device")):
        with pytest.raises(DataError, match=f"is {message}.*Give a file"):
            read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {"promt": "q"}}, "no key 'promt'. Nearest: prompt"),
        ({"kind": "chat"}, "kind='chat' is none of text, completion"),
        ({"kind": "text"}, "no 'text'"),
        ({"held_out": 1}, "holds 1 example, of which 1 cannot be held out"),
        ({"held_out": -0.5}, "cannot be held out"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, LINES["completion"]), **options)


def numbers(records: Records | None) -> list[int]:
    return [int(record.values["text"]) for record in records or ()]


def many(folder: Path, count: int = 100) -> Path:
    return write(folder, *({"text": str(i)} for i in range(count)))


def test_the_same_examples_are_held_out_every_time(tmp_path: Path) -> None:
    path = many(tmp_path)
    first, again, other = (read(path, seed=seed) for seed in (0, 0, 1))
    assert (len(first.train), len(first.valid or ())) == (95, 5)
    assert sorted(numbers(first.train) + numbers(first.valid)) == list(range(100))
    assert numbers(first.train) == sorted(numbers(first.train))
    assert numbers(first.valid) == numbers(again.valid) != numbers(other.valid)


def test_a_number_of_examples_or_none_are_held_out(tmp_path: Path) -> None:
    path = many(tmp_path)
    assert len(read(path, held_out=7).valid or ()) == 7
    assert read(path, held_out=0).valid is None
    assert len(read(path, held_out=0.001).valid or ()) == 1


def test_a_directory_has_its_own_parts(tmp_path: Path) -> None:
    for part, text in (("train", "1"), ("valid", "2"), ("test", "3")):
        write(tmp_path, {"text": text}, name=f"{part}.jsonl")
    data = read(tmp_path)
    assert [numbers(part) for part in (data.train, data.valid, data.test)] == [[1], [2], [3]]
    assert sorted(data.sha256) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
    (tmp_path / "valid.jsonl").write_bytes(dumped(LINES["label"]))
    with pytest.raises(DataError, match=r"valid\.jsonl holds 'label', but .*train\.jsonl 'text'"):
        read(tmp_path)


@pytest.mark.parametrize("names", [["data.jsonl"], ["train.jsonl", "validation.jsonl"], []])
def test_a_directory_with_other_names_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path, {"text": "1"}, name=name)
    with pytest.raises(DataError, match=f"has {', '.join(names) or 'no file'}, where"):
        read(tmp_path)


def test_a_plain_text_is_read_whole_and_its_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the text\r\n" for i in range(2000)) + "end"
    (tmp_path / "notes.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = read(tmp_path / "notes.md")
    assert isinstance(data, Dataset) and data.valid is not None
    pieces = [record.values["text"] for record in (*data.train, *data.valid)]
    assert "".join(pieces) == text.replace("\r\n", "\n")
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert data.valid[0].line == sum(piece.count("\n") for piece in pieces[: len(data.train)]) + 1
    assert 0.03 < len("".join(pieces[len(data.train) :])) / len(text) < 0.07


def test_a_plain_text_may_begin_with_a_brace(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{\n "a": 1}\n')
    assert read_file(tmp_path / "a.txt")[0].values["text"] == '{\n "a": 1}\n'


def test_a_text_without_lines_is_cut_at_spaces_or_anywhere(tmp_path: Path) -> None:
    for text in ("word " * 1000, "x" * 3000):
        (tmp_path / "a.txt").write_text(text)
        pieces = [record.values["text"] for record in read_file(tmp_path / "a.txt")]
        assert len(pieces) > 5
        assert "".join(pieces) == text


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.sampled_from(
        ["prompt", "completion", "messages", "role", "content", "text", "input", "label", "tools", "x"]
    )
    return st.dictionaries(keys, inner, max_size=5)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | objects(inner),
    max_leaves=8,
)


@given(st.lists(objects(values).map(dumped) | st.binary(max_size=20) | values.map(dumped), max_size=6))
def test_whatever_is_in_a_file_is_read_or_counted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: Any
) -> None:
    path = write(tmp_path_factory.mktemp("any"), *lines)
    try:
        found = read_file(path)
    except DataError:
        return
    counts = found.counts
    assert counts.read == counts.kept + sum(counts.bad.values())
    assert counts.kept == len(found) > 0


def test_many_lines_are_read_fast(tmp_path: Path) -> None:
    """100,000 a second or so; the bound leaves room for slow machines."""
    path = tmp_path / "many.jsonl"
    path.write_bytes((dumped({"prompt": "word " * 20, "completion": "ü" * 20}) + b"\n") * 20_000)
    begin = time.process_time()
    assert len(read(path).train) == 19_000
    assert time.process_time() - begin < 4
