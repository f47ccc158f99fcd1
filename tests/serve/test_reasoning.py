import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.serve import reasoning
from ropewalk.serve.reasoning import Arguments, Call, Content, Delta, Reasoning, merged, message

PIECES = st.sampled_from(["<think>", "</think>", "<", "</thi", "think>", "a", "b c", " ", "\n"])


def split(*pieces: str, inside: bool | None) -> list[Delta]:
    splitter = reasoning.Splitter(inside)
    return [delta for piece in pieces for delta in splitter.feed(piece)] + splitter.finish()


@pytest.mark.parametrize(
    ("inside", "text", "thought", "content"),
    [
        (False, "<think>\nwell\n</think>\n\nhi\n", "well", "hi\n"),
        (False, "\n<think>\n\n</think>\n\nhi", "", "hi"),
        (False, "\n hi <think>no</think>", "", "\n hi <think>no</think>"),
        (False, "<thin", "", "<thin"),
        (False, "<think>never < /think>\n", "never < /think>\n", ""),
        (True, "\nwell</think>hi</think>", "well", "hi</think>"),
        (True, "<think>\nwell</think>hi", "well", "hi"),
        (True, "well </thi", "well </thi", ""),
        (None, "<think>a</think>b", "", "<think>a</think>b"),
    ],
)
def test_thought_and_answer(inside: bool | None, text: str, thought: str, content: str) -> None:
    found = message(split(text, inside=inside))
    assert (found.get("reasoning_content", ""), found["content"]) == (thought, content)


@given(pieces=st.lists(PIECES), inside=st.sampled_from([None, False, True]))
def test_however_it_is_cut(pieces: list[str], inside: bool | None) -> None:
    whole = merged(split("".join(pieces), inside=inside))
    assert merged(split(*pieces, inside=inside)) == whole
    assert merged(split(*"".join(pieces), inside=inside)) == whole


def test_no_more_is_held_back_than_may_be_a_tag() -> None:
    splitter = reasoning.Splitter(True)
    assert splitter.feed("ab </th") == [Reasoning("ab")]
    assert splitter.feed("e") == [Reasoning(" </the")]
    assert splitter.feed("</think>\n") == []
    assert splitter.feed("\nhi </think") == [Content("hi </think")]


def test_a_template_and_its_prompt_tell_where_the_answer_begins() -> None:
    template = "{{ content.split('</think>')[-1] }}"
    assert reasoning.detect(template, "<|user|>hi<|assistant|><think>\n") is True
    assert reasoning.detect(template, "<|assistant|><think>\n\n</think>\n\n") is False
    assert reasoning.detect("{{ content }}", "<think>") is None
    assert reasoning.detect(None, "<think>") is None


def test_a_message_is_put_together_from_its_deltas() -> None:
    deltas = [Reasoning("a"), Call(0, "x", "f"), Arguments(0, "{"), Call(1, "y", "g")]
    answer = message([*deltas, Arguments(1, "{}"), Arguments(0, "}"), Reasoning("b")])
    calls = [(call["id"], call["function"]) for call in answer["tool_calls"]]
    assert calls == [
        ("x", {"name": "f", "arguments": "{}"}), ("y", {"name": "g", "arguments": "{}"}),
    ]  # fmt: skip
    assert (answer["content"], answer["reasoning_content"]) == (None, "ab")
