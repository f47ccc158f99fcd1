import json
import threading
import time
import tracemalloc
from typing import Any

import jinja2
import pytest
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ropewalk.text import sandbox

MESSAGES = [
    {"role": "system", "content": "Be <kind>."},
    {"role": "user", "content": "  naïve\n\ncafé 😀 " * 3},
    {"role": "assistant", "content": "a</think>b,c", "calls": [{"n": 1.5}, {"n": None}]},
]

ORDINARY = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m }}{% endfor %}",
    "{% for m in messages[::-1] if m.role != 'user' %}{{ m.content | trim }}{% endfor %}"
    "{% for m in messages if m.role == 'none' %}x{% else %}none{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ (1, 2)[0] }}",
    "{% for m in messages recursive %}{{ m.n or m.role }}"
    "{{ loop(m.calls) if m.calls }}{% endfor %}",
    "{% for i in range(3) %}{% for j in range(3) %}{{ loop.cycle('a', 'b') }}{% if j == 1 %}"
    "{% continue %}{% endif %}{{ i * j - 1 }}{% endfor %}{% endfor %}",
    "{% macro f(x, y=[1], z='d') %}<{{ x }}|{{ y }}|{{ z }}|{{ varargs }}>"
    "{{ caller() if caller }}{% endmacro %}"
    "{{ f(1) ~ f('a', {'b': 2}, 3, 4) }}{% call f(0) %}in{% endcall %}",
    "{% set ns = namespace(n=0, t='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% set ns.t = ns.t + m.role[0] ~ '.' %}"
    "{% endfor %}{{ ns.n }} {{ ns.t }}",
    "{% set x %}a {{ messages[1].content }}{% endset %}{{ x | upper }}"
    "{% filter indent(2) %}a\nb\n{% endfilter %}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('b').split(',') }}{{ 'a b  c'.split() }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('-', 'content') }}",
    "{{ messages | selectattr('calls') | list | length }}",
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | list }}",
    "{{ [3, 1, 2] | sort(reverse=true) }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{{ messages[0] | items | list }}{{ messages | groupby('role') | map('first') | list }}",
    "{{ '%s is %05.1f%%' % ('x', 2) }}{{ '%(a)s' | format(a=1) }}",
    "{{ '{} {b!r:>4}'.format(1, b='é') }}{{ '{{}}'.format() }}{{ '{a}'.format_map({'a': 1}) }}",
    "{{ 'a' * 3 ~ [1] * 2 ~ -7 // 2 ~ 7 % 4 ~ 2 ** 10 ~ 1 / 4 ~ 'x' }}{{ [1] + [2, 'é'] }}",
    "{{ 'x'.join(['a', 'b']) }}{{ 'aXbX'.replace('X', '--') }}{{ 'aXbX' | replace('X', '--', 1) }}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ range(7) | slice(3) | map('list') | list }}",
    "{{ 1.25 | round(1) }}{{ '12' | int + 1 }}{{ none }}{{ missing }}{{ missing | default('d') }}",
    "{{ '<b>' | e }}{{ '<b>' | safe ~ '&' }}{{ true }}{{ [none] }}{{ 'x' | center(5) }}|",
    "{% autoescape true %}{{ '<b>' }}{{ '<i>' | safe }}{% endautoescape %}{{ 5 in range(9) }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ cycler(1, 2).next() }}{{ messages[0].get('none', 'x') }}",
    "{% block b %}{{ messages[0].role if 1 is defined else 2 }}{% endblock %}{{ self.b() }}",
    "{{ [1, 1, 2] | unique | list }}{{ messages | map('length') | max }}{{ [1, 2] | sum }}",
]


def environment(kind: type[jinja2.Environment]) -> jinja2.Environment:
    return kind(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])


def compiled(template: str) -> jinja2.Template:
    return environment(sandbox.Environment).from_string(template)


@pytest.mark.parametrize("template", ORDINARY)
def test_ordinary_templates_write_what_they_do_without_limits(template: str) -> None:
    plain = environment(ImmutableSandboxedEnvironment).from_string(template)
    variables = {"messages": MESSAGES}
    assert sandbox.render(compiled(template), variables) == plain.render(variables)


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_is_what_python_writes(indent: Any) -> None:
    template = compiled("{{ messages | tojson(indent=indent) }}")
    text = sandbox.render(template, {"messages": MESSAGES, "indent": indent})
    assert text == json.dumps(MESSAGES, ensure_ascii=False, indent=indent)


LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
LOOPS, ENDS = LOOP + LOOP.replace("for i", "for j"), END + END
STATE = "{% set ns = namespace(x=[], s='ab', n=3) %}"
LONG = "{% set b = 'a' * 4000000 %}"

HOSTILE = {
    "loops": LOOPS + ENDS,
    "loops that write": LOOPS + "x" + ENDS,
    "loops that keep": "{% set x %}" + LOOPS + "{{ i }}{{ j }}" * 9 + ENDS + "{% endset %}",
    "a recursive loop": "{% for i in range(99999) recursive %}{% if loop.depth < 3 %}"
    "{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "loops in filters": LOOP + "{{ range(99999) | map('string') | map('upper') | list }}" + END,
    "loops in tests": "{{ range(99999) | select('in', range(99999) | list) | list }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "a text times": "{{ 'a' * 10**10 }}",
    "a constant times": "{{ 10000000000 * 'a' }}",
    "a list times": "{{ [0] * 10**10 }}",
    "a power": "{{ 10**(10**10) }}",
    "squares": STATE + LOOP + "{% set ns.n = ns.n * ns.n %}" + END,
    "rounding": "{{ 5 | round(-10000000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "ljust of constants": "{{ 'a'.ljust(10000000000) }}",
    "ljust by attr": "{{ ('a' | attr('ljust'))(10000000000) }}",
    "expandtabs": r"{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "translate": LONG + "{{ b.translate({97: b}) }}",
    "bytes of a number": "{{ (5).to_bytes(10000000000, 'big') }}",
    "center": "{{ 'x' | center(10**10) }}",
    "center of constants": "{{ 'x' | center(width=10000000000) }}",
    "center by map": "{{ ['x'] | map('center', 10000000000) | list }}",
    "many centers": "{{ range(99999) | map('string') | map('center', 1000) | list | length }}",
    "%d": "{{ '%1000000000d' % 1 }}",
    "%*d": "{{ '%*d' % (1000000000, 1) }}",
    "%(a)d": "{{ '%(1a)-01000000000d' % {'1a': 1} }}",
    "%((a))d": "{{ '%((a)b)1000000000d' % {'(a)b': 1} }}",
    "% often": LONG + "{{ ('%(a)s' * 100000) % {'a': b} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format in format": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format often": LONG + "{{ ('{0}' * 100000).format(b) }}",
    "doubled": STATE + LOOP + "{% set ns.s = ns.s + ns.s %}" + END,
    "doubled by ~": STATE + LOOP + "{% set ns.s = ns.s ~ ns.s %}" + END,
    "doubled by set": STATE + LOOP + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}" + END,
    "grown": STATE + LOOP + "{% set ns.s = ns.s ~ '" + "x" * 100 + "' %}" + END,
    "a doubled list": STATE + LOOP + "{% set ns.x = [ns.x, ns.x] %}" + END + "{{ ns.x }}",
    "a doubled dict": STATE + LOOP + "{% set ns.x = dict(a=ns.x, b=ns.x) %}" + END + "{{ ns.x }}",
    "dict.fromkeys": LONG + "{{ dict.fromkeys(range(99999), b) }}",
    "doubled views": STATE + "{% set ns.x = {} %}" + LOOP
    + "{% set ns.x = {'a': ns.x.items(), 'b': ns.x.items()} %}" + END + "{{ ns.x }}",
    "a deep list": STATE + LOOP + "{% set ns.x = [ns.x] %}" + END + "{{ ns.x }}",
    "many lists": STATE + LOOPS + "{% set ns.x = [ns.x, [" + "[]," * 999 + "]] %}" + ENDS,
    "many slices": LONG + "".join(f"{{% set v{i} = b[1:] %}}" for i in range(999)),
    "a long concatenation": LONG + "{{ b" + " ~ b" * 5000 + " }}",
    "join": LONG + "{{ ([b] * 50) | join(b) }}",
    "join of long": "{{ range(99999) | join('x' * 1000000) }}",
    "join method": "{{ ('x' * 1000000).join(['a'] * 1000000) }}",
    "replace": "{{ ('a' * 1000000) | replace(new='b' * 1000000, old='a') }}",
    "replace method": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "a filter block": "{% filter replace('a', 'b' * 1000000) %}{{ 'a' * 1000000 }}{% endfilter %}",
    "sort keys": LONG + "{{ ([0] * 99999) | map('default', b, true) | sort | length }}",
    "split": r"{{ ('é日\x1f' * 1300000).split() | length }}",
    "characters": "{{ ('日é' * 2000000) | list | length }}",
    "words": "{{ ('日é ' * 1300000) | wordcount }}",
    "urlencode": "{{ ('日é ' * 1300000) | urlencode | length }}",
    "loop of characters": "{% for c in '日é' * 2000000 %}{{ loop.length }}{% endfor %}",
    "indent": r"{{ ('a\n' * 1000000) | indent('x' * 1000000) }}",
    "indent by number": "{{ 'a' | indent(width=10000000000, first=true) }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list }}",
    "many batches": "{{ ([0] * 4000000) | batch(1) | list | length }}",
    "undefined": "{{ ([0] * 4000000) | map(attribute='x') | list | length }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "sum of lists": "{{ ([[0] * 1000] * 1000) | sum(start=[]) }}",
    "json indent": "{{ [1] | tojson(indent=10000000000) }}",
    "json separators": "{{ [1, 2] | tojson(separators=('x' * 1000000, ':')) }}",
    "json of much": "{{ ([1] * 3000000) | tojson(indent='x' * 64) | length }}",
    "lipsum": "{{ lipsum(100000000) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_ends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Soon, without much memory, and in a thread that is not the main one."""
    monkeypatch.setattr(sandbox, "RENDER_S", 0.25)
    template = compiled(HOSTILE[name])
    raised: list[Exception] = []

    def run() -> None:
        try:
            sandbox.render(template, {})
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    tracemalloc.start()
    started = time.monotonic()
    thread.start()
    thread.join()
    took = time.monotonic() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert raised and isinstance(raised[0], RecursionError | jinja2.TemplateError), raised
    assert took < 5 and peak < 100e6


def test_the_time_of_a_rendering_is_limited() -> None:
    template = compiled(HOSTILE["loops in tests"])
    started = time.thread_time()
    with pytest.raises(SecurityError, match=r"more than 2\.0 s"):
        sandbox.render(template, {})
    assert time.thread_time() - started < 2.5


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (messages | attr('__class__')).mro() }}",
        # CVE-2024-56326: `format` kept, and called by other means than a call
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
        "{% set ns = namespace(f='{0.__class__.__mro__}'.format) %}{{ ns.f(1) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
        # CVE-2025-27516: `format` by the filter attr
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
        "{{ (['{0.__class__.__mro__}'] | map('attr', 'format') | first)(1) }}",
        "{{ ('{a.__class__.__mro__}' | attr('format_map'))({'a': 1}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ range.__call__.__self__ }}",
        "{% for i in [1] %}{{ loop.__class__.__mro__ }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f.__call__.__func__.__globals__ }}",
        "{% set x = ('a' | map('upper')) %}{{ x.gi_frame.f_globals }}",
        "{{ ([1] | _each(1)).gi_frame.f_globals }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_there_is_no_way_out(escape: str) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError)):
        sandbox.render(compiled(escape), {"messages": MESSAGES})


@pytest.mark.parametrize("name", ["{x", "'''\n", '"""\\', "{print(1)}"])
def test_the_name_of_a_template_is_no_code(name: str) -> None:
    """CVE-2024-56201: the name stands in the program that is made of a template."""
    made = environment(sandbox.Environment)
    source = made.compile("{% block b %}{{ a | missing }}{% endblock %}", name, name, raw=True)
    names = compile(source, "made", "exec").co_names
    assert "print" not in names
    with pytest.raises(jinja2.TemplateError, match="No filter named 'missing'"):
        sandbox.render(made.from_string("{{ a | missing }}"), {})
