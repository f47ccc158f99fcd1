import contextlib
import copy
import dataclasses

import pytest

from ropewalk.core.errors import DataError
from ropewalk.text import chat, sandbox
from ropewalk.text.interface import Tokenizer
from ropewalk.text.tokenizer import HuggingFaceTokenizer, byte_tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}\n"
    "  {% if m['role'] not in ['system', 'user', 'assistant'] %}\n"
    "    {{ raise_exception('unknown role ' + m['role']) }}\n"
    "  {% endif %}\n"
    "{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def with_template(template: str | None) -> Tokenizer:
    plain = byte_tokenizer()
    roles = dataclasses.replace(plain.roles, chat_template=template)
    return HuggingFaceTokenizer(plain._parsing, "test", roles)


def test_messages_become_the_text_that_the_template_says() -> None:
    messages = [{"role": "user", "content": "<b> & é"}, {"role": "assistant", "content": "ok"}]
    text = chat.render(with_template(CHATML), messages)
    assert text == "<|bos|>[user]<b> & é<|eos|>[assistant]ok<|eos|>[assistant]"
    assert chat.render(with_template(CHATML), messages, False) == text.removesuffix("[assistant]")


def test_template_tokens_become_special_ids_once() -> None:
    tokenizer = with_template(CHATML)
    ids = chat.encode(tokenizer, [{"role": "user", "content": "hi"}])
    assert ids.count(256) == 1 and ids.count(257) == 1
    assert tokenizer.decode(ids) == "[user]hi[assistant]"


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="give it as UTF-8"):
        chat.encode(with_template(CHATML), [{"role": "user", "content": "a\udcff"}])


def test_functions_that_templates_expect() -> None:
    template = (
        "{{ tools | tojson }}|{{ strftime_now('%Y') | length }}|"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% break %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    text = chat.render(with_template(template), messages, tools=[{"name": "<é'&>"}])
    assert text == '[{"name": "<é\'&>"}]|4|one'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% if %}", "line 1, is not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0]['absent'] + 'x' }}", "absent"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "fails.*limit 4194304"),
        ("{{ strftime_now('%Y' * 1000) }}", "strftime_now of 2000 characters, limit 200"),
        ("{{ raise_exception('no' * 1000000) }}", "refuses"),
        ("{{ 1e999 }}", "inf"),
        ("{{ 'abc' | truncate(1, True, 'xx', 0) }}", "expected length"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "not valid Jinja: too many"),
        ("{{ " + "(" * 9000 + ")" * 9000 + " }}", "not valid Jinja: maximum recursion"),
        ("x" * 100_000, "has 100000 characters, limit 65536"),
    ],
)
def test_what_a_template_cannot_do(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        chat.render(with_template(template), [{"role": "user", "content": "hi"}])
    assert len(str(raised.value)) < 1200


@pytest.mark.parametrize(
    "change",
    [
        "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}",
        "{{ messages[0].pop('role') }}",
        "{{ (messages[0] | attr('update'))(a=1) }}", "{{ messages[0]['setdefault']('a', 1) }}",
        "{{ messages[0].parts.extend([1]) }}", "{{ messages[0].parts | map('attr', 'clear') }}",
        "{% set messages[0].content = 'x' %}", "{% set messages.x = 'x' %}",
        "{% set ns = messages[0] %}{% set ns.content = 'x' %}",
        "{% for m in messages %}{% set m = {} %}{% endfor %}{{ messages | reverse | list }}",
    ],
)  # fmt: skip
def test_no_template_changes_the_messages(change: str) -> None:
    messages = [{"role": "user", "content": "hi", "parts": [{"a": 1}]}]
    before = copy.deepcopy(messages)
    with contextlib.suppress(DataError):
        chat.render(with_template(change), messages, tools=messages)
    assert messages == before


def test_a_long_conversation_is_rendered_and_a_longer_one_refused() -> None:
    messages = [{"role": "user", "content": "é" * 5000}] * 800
    assert len(chat.render(with_template(CHATML), messages)) > 4_000_000
    with pytest.raises(DataError, match=f"limit {sandbox.OUTPUT_CHARS}"):
        chat.render(with_template(CHATML), messages * 2)
