import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.serve import reasoning
from ropewalk.serve.deltas import Arguments, Call, Content, Delta, Reasoning, merged, message
from ropewalk.serve.reasoning import Channels, Thinking, ThinkTags
from ropewalk.serve.tools import Parser

THINKING = [None, ThinkTags(False), ThinkTags(True), Channels()]
PIECES = st.sampled_from([
    "<think>", "</think>", "<", "</thi", "think>", "a", "b c", " ", "\n", *Channels.markers, "<|",
    "|>", "analysis", "final", "commentary", "assistant", " to=functions.f",
])  # fmt: skip


def split(*pieces: str, thinking: Thinking | None) -> list[Delta]:
    parser = Parser(None, (), thinking)
    return [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()


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
    found = message(split(text, thinking=None if inside is None else ThinkTags(inside)))
    assert (found.get("reasoning_content", ""), found["content"]) == (thought, content)


SAID = "<|channel|>final<|message|>hi"
TOOL = "<|channel|>commentary to=python code<|message|>1"


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        (f"<|channel|>analysis<|message|>Well<|end|><|start|>assistant{SAID}<|return|>",
         "Well", "hi"),
        (f"<|channel|>analysis<|message|>a\n<|end|><|start|>assistant<|channel|>analysis"
         f"<|message|>b < c<|end|><|start|>assistant{SAID}", "a\nb < c", "hi"),
        ("<|channel|>commentary<|message|>So:<|end|><|start|>assistant<|channel|>final<|message|>hi",
         "", "So:\n\nhi"),
        ("<|channel|>analysis<|message|>Well <|en", "Well <|en", ""),
        ("<|channel|>analysis<|message|>Well<|end|><|start|>assist", "Well", ""),
        ("<|channel|>final <|message|>\n hi <think>\n", "", "\n hi <think>\n"),
        ("<|chan", "", "<|chan"),
        ("hi <|channel|>final", "", "hi <|channel|>final"),
        (TOOL, "", TOOL),
        (f"{TOOL}<|call|><|start|>assistant{SAID}", "", f"{TOOL}<|call|>hi"),
        ("<|channel|>secret<|message|>a", "", "<|channel|>secret<|message|>a"),
        ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}"),
        ("<|channel|>final json<|message|>{}", "", "{}"),
        ("<|channel|>commentary?<|end|><|start|>assistant<|channel|>analysis<|message|>a<|end|>"
         f"<|start|>assistant{SAID}", "a", "hi"),
        ("<|channel|>commentary to=functions.get <|constrain|>json<|message|>", "", ""),
        (" to=functions.get<|channel|>comm", "", ""),
        (f"<|channel|>{'a' * 300}{SAID}", "", f"<|channel|>{'a' * 300}{SAID}"),
    ],
)  # fmt: skip
def test_thought_and_answer_in_channels(text: str, thought: str, content: str) -> None:
    found = message(split(text, thinking=Channels()))
    assert (found.get("reasoning_content", ""), found["content"]) == (thought, content)


@given(pieces=st.lists(PIECES), thinking=st.sampled_from(THINKING))
def test_however_it_is_cut(pieces: list[str], thinking: Thinking | None) -> None:
    whole = merged(split("".join(pieces), thinking=thinking))
    assert merged(split(*pieces, thinking=thinking)) == whole
    assert merged(split(*"".join(pieces), thinking=thinking)) == whole


def test_no_more_is_held_back_than_may_be_a_tag() -> None:
    splitter = ThinkTags(True).splitter()
    assert splitter.feed("ab </th") == [Reasoning("ab")]
    assert splitter.feed("e") == [Reasoning(" </the")]
    assert splitter.feed("</think>\n") == []
    assert splitter.feed("\nhi </think") == [Content("hi </think")]


def test_a_template_and_its_prompt_tell_where_the_answer_begins() -> None:
    template = "{{ content.split('</think>')[-1] }}"
    assert reasoning.detect(template, "<|user|>hi<|assistant|><think>\n") == ThinkTags(True)
    assert reasoning.detect(template, "<|assistant|><think>\n\n</think>\n\n") == ThinkTags(False)
    assert reasoning.detect("{{ content }}", "<think>") is None
    assert reasoning.detect(None, "<think>") is None
    assert reasoning.detect("<|start|>assistant<|channel|>final<|message|>", "") == Channels()


def test_a_message_is_put_together_from_its_deltas() -> None:
    deltas = [Reasoning("a"), Call(0, "x", "f"), Arguments(0, "{"), Call(1, "y", "g")]
    answer = message([*deltas, Arguments(1, "{}"), Arguments(0, "}"), Reasoning("b")])
    calls = [(call["id"], call["function"]) for call in answer["tool_calls"]]
    assert calls == [
        ("x", {"name": "f", "arguments": "{}"}), ("y", {"name": "g", "arguments": "{}"}),
    ]  # fmt: skip
    assert (answer["content"], answer["reasoning_content"]) == (None, "ab")
