import dataclasses

import pytest

from ropewalk.core.errors import DataError
from ropewalk.text import chat
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
    ],
)
def test_what_a_template_cannot_do(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chat.render(with_template(template), [{"role": "user", "content": "hi"}])
