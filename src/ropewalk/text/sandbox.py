"""Jinja for templates of strangers: what one rendering may take of time and memory is limited.

It works in whatever thread calls: every loop, call, filter, operator and text that is written is
counted, and what could make much of little is measured before it is done. Knows no conversation.
"""

import io
import json
import re
import string
import sys
import time
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import filters, nodes, sandbox, utils, visitor
from jinja2.exceptions import SecurityError

OUTPUT_CHARS = 4 * 1024**2  # of the conversation, and of any text or list on the way to it
RENDER_S = 2.0  # of a processor's time
RENDER_BYTES = 64 * 1024**2  # of all that is made on the way

_FLAT_BYTES, _LINK_BYTES = 64, 8  # of what is not measured, and of its place in a list
_BLANKS = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
_NUMBER_BITS = 10_000
_MANY = (list, tuple, set, frozenset, abc.KeysView, abc.ValuesView, abc.ItemsView)
_WIDE = re.compile(r"%(\([^()]*\))?[#0\- +]*(\*|\d{5}|\d*\.(\*|\d{5}))|%\([^()]*\(")
# What no chat template needs and no bound is known for.
_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_METHODS = {"encode", "expandtabs", "maketrans", "striptags", "translate", "unescape"}
_EAGER = {
    "batch", "dictsort", "groupby", "join", "list", "max", "min", "slice", "sort", "sum", "unique",
}  # fmt: skip
_CHOOSING = {"reject", "rejectattr", "select", "selectattr"}
_CUTTING = {*_EAGER, *_CHOOSING, "map", "title", "urlencode", "wordcount"}
_KEEPING = {"attr", "d", "default", "first", "last", "max", "min", "random"}  # make nothing new


class _Work:
    """What one rendering may still do. Its methods raise SecurityError at the end of it."""

    def __init__(self) -> None:
        self._end_s = time.thread_time() + RENDER_S
        self._left_bytes = RENDER_BYTES

    def spend(self, count: int = _FLAT_BYTES) -> None:
        """Counts so many bytes, and looks at the clock."""
        self._left_bytes -= count
        if self._left_bytes < 0:
            raise SecurityError(f"it takes more than {RENDER_BYTES} bytes")
        if time.thread_time() > self._end_s:
            raise SecurityError(f"it takes more than {RENDER_S} s")

    def fits(self, count: int) -> None:
        """Nothing may be larger than the whole text."""
        if count > OUTPUT_CHARS:
            raise SecurityError(
                f"a text or list of {count} characters or values, limit {OUTPUT_CHARS}"
            )

    def weigh(self, *values: Any) -> int:
        """How long the values would be as text, about; a list may hold the same one many times."""
        waiting, found, looked = list(values), 0, 0
        while waiting:
            value = waiting.pop()
            looked += 1
            if looked % 1024 == 0:
                self.spend(0)
            if isinstance(value, Mapping):
                value = [*value, *value.values()]
            if isinstance(value, _MANY):
                self.fits(found + len(waiting) + len(value))
                waiting += [*value]
            found += len(value) if isinstance(value, str) else 1
            self.fits(found)
        return found

    def made(self, value: Any) -> Any:
        """The value, counted."""
        if isinstance(value, str):
            self.fits(len(value))
            self.spend(sys.getsizeof(value))
        elif isinstance(value, list | tuple | dict):
            texts = () if isinstance(value, dict) else (x for x in value if isinstance(x, str))
            self.spend(sys.getsizeof(value) + sum(map(sys.getsizeof, texts)))
        else:
            self.spend()
        if isinstance(value, int) and value.bit_length() > _NUMBER_BITS:
            raise SecurityError(f"a number of more than {_NUMBER_BITS} bits")
        return value

    def text(self, pieces: Iterable[str], between: str = "") -> str:
        """The pieces as one text."""
        whole, length = io.StringIO(), 0
        for i, piece in enumerate(pieces):
            length += len(piece) + len(between) * (i > 0)
            self.fits(length)
            whole.write(between * (i > 0) + piece)
        return self.made(whole.getvalue())

    def formats(self, form: str, *values: Any) -> None:
        """For `form % values` and `form.format(*values)`: each field may hold all of them."""
        wide = _WIDE.search(form) is not None
        fields = form.count("%")
        if "{" in form:
            try:
                for _, name, spec, _ in string.Formatter().parse(form):
                    fields += name is not None
                    wide |= "{" in (spec or "") or re.search(r"\d{5}", spec or "") is not None
            except ValueError:
                pass  # formatting says what is wrong
        if wide:
            raise SecurityError("a format with a width of its own or of 10000 on")
        self.fits(len(form) + fields * (self.weigh(*values) + 10_000))


_WORK: ContextVar[_Work] = ContextVar("work")


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template of an `Environment`. Raises SecurityError beyond the limits of this
    module, and whatever a template can raise."""
    token = _WORK.set(_Work())
    try:
        return template.render(variables)
    finally:
        _WORK.reset(token)


class _Watched(visitor.NodeTransformer):
    """Puts what a template makes, and what it loops over, through filters of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Each turn of a loop is counted, with what it can write."""
        written = sum(len(output.nodes) for output in node.find_all(nodes.Output))
        self.generic_visit(node)
        node.iter = _through("_each", node.iter, nodes.Const(written))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        """Never run when the template is compiled, as a filter of constants would be."""
        self.generic_visit(node)
        node.args = [nodes.Const(node.name), *node.args]
        node.name = "_filter"
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` is measured piece by piece."""
        self.generic_visit(node)
        return _through("_text", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice is a copy."""
        sliced = isinstance(node.arg, nodes.Slice)
        return self.visit_List(node) if sliced else self.generic_visit(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """As `visit_List`, where it is no target of an assignment."""
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        """A list may hold the same text many times."""
        self.generic_visit(node)
        return _through("_made", node)

    visit_Dict = visit_List


def _through(name: str, node: nodes.Node, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [*arguments], [], None, None, lineno=node.lineno)


class Environment(sandbox.ImmutableSandboxedEnvironment):
    """Counts in `_WORK` what a template does."""

    intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        for name in _FILTERS:
            del self.filters[name]
        ours: dict[str, Callable[..., Any]] = {
            "_each": _each, "_filter": _filter, "_made": _made, "_text": _text,
            "join": _join, "tojson": _tojson,
        }  # fmt: skip
        self.filters.update(ours)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename)).set_environment(self)

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a template, macro or block."""
        return _WORK.get().text(pieces)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Nothing of numbers, and not all of texts."""
        if isinstance(obj, int | float | bytes) or (isinstance(obj, str) and attr in _METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` of a text, measured."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def measured(*arguments: Any, **named: Any) -> str:
            work = _WORK.get()
            work.formats(value.__self__, arguments, named)
            return work.made(formatted(*arguments, **named))

        return measured

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, measured."""
        work = _WORK.get()
        work.spend()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str):
            work.formats(left, right)
        elif operator == "*" and not numbers:
            times, many = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int):
                work.fits(work.weigh(many) * max(times, 1))
        elif operator == "+" and isinstance(left, list | tuple):
            work.weigh(left, right)
        elif operator in ("*", "**") and numbers:
            bits = left.bit_length() * right if operator == "**" else 0
            if max(bits, left.bit_length(), right.bit_length()) > _NUMBER_BITS:
                raise SecurityError(f"a number of more than {_NUMBER_BITS} bits")
        return work.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call, measured."""
        work = _WORK.get()
        work.spend()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = _measured_method(work, owner, obj.__name__, args, kwargs)
        made = super().call(context, obj, *args, **kwargs)
        if isinstance(made, list | tuple | dict) and not isinstance(owner, list | tuple | dict):
            work.weigh(made)
        return work.made(made)

    def call_filter(
        self,
        name: str,
        value: Any,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        context: Any = None,
        eval_ctx: Any = None,
    ) -> Any:
        """A filter, measured; `map` calls others by this too."""
        work = _WORK.get()
        work.spend()
        value = _measured_filter(work, name, value, args or (), kwargs or {})
        made = super().call_filter(name, value, args, kwargs, context, eval_ctx)
        if name in _KEEPING:
            return made
        if isinstance(made, Iterator):
            return _counted(work, made, name in _CHOOSING)
        if isinstance(made, list | tuple | dict):
            work.weigh(made)
        return work.made(made)

    def call_test(self, *args: Any, **kwargs: Any) -> bool:
        """A test that `select` or `reject` makes."""
        _WORK.get().spend(0)
        return super().call_test(*args, **kwargs)


class _Namespace(utils.Namespace):
    """One that is not written with all it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


def _measured_method(
    work: _Work, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a text's method, where what it makes of them is not too much."""
    if name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
        work.fits(args[0])
    elif name == "join" and args:
        if isinstance(args[0], str):
            work.spend(_FLAT_BYTES * len(args[0]))
        pieces = list(args[0])
        work.fits(work.weigh(pieces) + len(text) * len(pieces))
        return (pieces, *args[1:])
    elif name == "replace":
        _measure_replace(work, text, *args[:2])
    elif name in ("split", "rsplit", "splitlines"):
        cut = kwargs.get("sep", args[0] if args else None)
        cuts = text.count(cut) if isinstance(cut, str) and cut else sum(map(text.count, _BLANKS))
        work.spend(_FLAT_BYTES * cuts)
    return args


def _measured_filter(
    work: _Work, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The value of a filter, where what the filter makes of it is not too much."""
    given = [*args, *kwargs.values()]
    wide = max((abs(x) if isinstance(x, int) else len(x) for x in given if _sized(x)), default=4)
    if isinstance(value, str) and name in _CUTTING:
        work.spend(_FLAT_BYTES * len(value))
    if name in ("center", "batch", "slice"):
        work.fits(wide)
    elif name == "indent":
        work.fits(wide * (1 + sum(map(str(value).count, _BLANKS))))
    elif name == "round" and wide > 300:
        raise SecurityError(f"rounding to {wide} digits")
    elif name == "format":
        work.formats(str(value), args, kwargs)
    elif name == "replace":
        old, new = [*args[:2], *map(kwargs.get, ("old", "new")[len(args) :])][:2]
        _measure_replace(work, str(value), str(old), str(new))
    elif name == "sum" and any(isinstance(x, list | tuple) for x in given):
        raise SecurityError("a sum of lists")
    if name in _CHOOSING and isinstance(value, list | tuple):
        value = _counted(work, iter(value), True)
    elif name in _EAGER:
        value = list(value) if isinstance(value, Iterator) else value
        work.weigh(value)
    return value


def _measure_replace(work: _Work, text: str, old: Any = None, new: Any = None) -> None:
    if isinstance(old, str) and isinstance(new, str):
        work.fits(len(text) + text.count(old) * len(new))


def _sized(value: Any) -> bool:
    return isinstance(value, int | str)


def _counted(work: _Work, values: Iterator[Any], chosen: bool) -> Iterator[Any]:
    for value in values:
        if chosen:
            work.spend(_LINK_BYTES)
        else:
            work.made(value)
        yield value


@jinja2.pass_context
def _written(context: Any, value: Any) -> str:
    work = _WORK.get()
    if not isinstance(value, str):
        return work.made(str(value))
    work.spend()
    return value


@jinja2.pass_context
def _each(context: Any, values: Iterable[Any], written: int) -> Iterator[Any]:
    work = _WORK.get()
    if isinstance(values, str):
        work.spend(_FLAT_BYTES * len(values))
    for value in values:
        work.spend(_FLAT_BYTES + _LINK_BYTES * written)
        yield value


@jinja2.pass_context
def _filter(context: Any, value: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
    return context.environment.call_filter(name, value, args, kwargs, context=context)


@jinja2.pass_context
def _made(context: Any, value: Any) -> Any:
    work = _WORK.get()
    work.weigh(value)
    return work.made(value)


@jinja2.pass_context
def _text(context: Any, pieces: list[Any]) -> str:
    return _WORK.get().text(map(str, pieces))


@jinja2.pass_environment
def _join(environment: Any, values: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(filters.make_attrgetter(environment, attribute), values)
    return _WORK.get().text(map(str, values), str(d))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """As Hugging Face's: plain JSON, without Jinja's escapes for HTML."""
    work = _WORK.get()
    work.weigh(value)
    wide = indent if isinstance(indent, int) else len(indent or "")
    if wide > 64 or max(map(len, separators or ("",))) > 8:
        raise SecurityError("JSON with many characters between its values")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return work.text([encoder.encode(value)] if indent is None else encoder.iterencode(value))
