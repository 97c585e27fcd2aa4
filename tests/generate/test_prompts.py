"""Prompts of files: what a line may hold, what is said of others, and which adapter each meets."""

from pathlib import Path

import pytest

from lora_jax.data import DataError
from lora_jax.errors import ConfigError
from lora_jax.generate.prompts import Prompt, assigned, read_prompts, text_prompt


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_lines_hold_prompts_or_conversations(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p.jsonl",
        '{"prompt": "one", "adapter": "fr"}',
        "",
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}, '
        '{"role": "assistant", "content": "left out"}], "adapter": null}',
        '{"prompt": [{"role": "user", "content": "three"}], "completion": "passed over"}',
    )
    one, two, three = read_prompts(path)
    assert one == ([{"role": "user", "content": "one"}], "one", None, "fr", True, f"{path}:1")
    assert [each["role"] for each in two.messages] == ["system", "user"] and two.text == "two"
    assert two.chosen and two.adapter is None and two.where == f"{path}:3"
    assert three.text == "three" and not three.chosen


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ('{"prompt": "a", "adaptor": "b"}', "'adaptor' means nothing here; nearest: adapter"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"adapter": "a"}', "either prompt or messages; this line has adapter"),
        ('{"prompt": 3}', "a prompt is a text"),
        ('{"messages": [{"content": "a"}]}', "objects with role and content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no message before the answer"),
        ('{"prompt": "a", "adapter": 3}', "adapter is 3; give its name"),
    ],
)
def test_other_lines_are_refused_by_their_number(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(DataError, match=said) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_prompts(written(tmp_path / "p.jsonl"))


def test_every_line_meets_the_adapter_it_names() -> None:
    base = Prompt([], "a", adapter=None, chosen=True, where="f:1")
    french, open_one = base._replace(adapter="fr", where="f:2"), text_prompt("a")._replace(where="f:3")
    assert [each.adapter for each in assigned([base, french, open_one], ["fr"])] == [None, "fr", "fr"]
    assert [each.adapter for each in assigned([open_one], [])] == [None]
    assert [each.adapter for each in assigned([open_one], ["fr", "de"], everywhere=True)] == ["fr", "de"]
    assert [each.adapter for each in assigned([open_one], [], everywhere=True)] == [None]
    with pytest.raises(ConfigError, match="f:3: name one of fr, de in it"):
        assigned([open_one], ["fr", "de"])
    with pytest.raises(ConfigError, match="f:2: there is no adapter 'fr'; none is given"):
        assigned([french], [])
