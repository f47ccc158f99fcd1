"""The rules of the house as functions: each takes one parsed file and yields what breaks the rule.

`test_rules.py` shows that every rule can fail; `test_source.py` holds the tree to them.
"""

import ast
import re
import tokenize
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path

FUNCTION_LINES = 60
FILE_LINES = 500
CONSTRUCTOR_PARAMETERS = 10

VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "misc", "deprecated"}
CONFIG_NAMES = {"config", "cfg", "run"}
CONFIG_ATTRIBUTES = {"config", "cfg"}
SKIP = re.compile(r"(pytest|unittest|self)\.(mark\.)?(skip\w*|xfail|importorskip)", re.I)
HARDWARE = re.compile(r"\b(GPU|TPU|CUDA|ROCm|NVIDIA|AMX|accelerator|devices?|cores?)s?\b", re.I)

# Dotted names that no file may mention, and the folders (under src/ropewalk) that may after all.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "pickle": (), "cloudpickle": (), "dill": (), "shelve": (), "joblib": (), "marshal": (),
    "yaml.load": (), "yaml.full_load": (), "yaml.unsafe_load": (),
    "torch": (), "tensorflow": (), "transformers": (),
    "flax.linen": (), "flax.nnx.bridge": (), "flax.nnx.jit": (), "flax.nnx.scan": (),
    "flax.nnx.Intermediate": (), "self.sow": (),
    "jax.experimental.pallas": ("ops/kernels",), "jax.ffi": ("ops/kernels",),
}  # fmt: skip

# Words of a foreign file format that are spelt like a family, by file.
FORMAT_WORDS = {
    # GGUF's `tokenizer.ggml.model` for sentencepiece and for byte-level BPE, and one of its ways to
    # split words
    "text/parts.py": ("gpt2", "llama", "qwen2"),
}


@dataclass(frozen=True)
class Source:
    """A Python file: its path under src/ropewalk (or under tests) and its text."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def comments(self) -> dict[int, str]:
        """Line number -> comment, markers that only speak to a tool left out."""
        tokens = tokenize.generate_tokens(StringIO(self.text).readline)
        found = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        return {
            line: comment
            for line, comment in found.items()
            if comment and not re.match(r"(noqa|type:|pyright:|fmt:)", comment)
        }

    def within(self, *folders: str) -> bool:
        return any(self.path.is_relative_to(folder) for folder in folders)

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


Rule = Callable[[Source], Iterator[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def function_length(source: Source) -> Iterator[str]:
    if source.within("ops/kernels"):
        return
    for function in _functions(source.tree):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES:
            yield source.at(function, f"{function.name} has {lines} lines, limit {FUNCTION_LINES}")


def file_length(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        yield f"{source.path}: {lines} lines, limit {FILE_LINES}"


def constructor_parameters(source: Source) -> Iterator[str]:
    for function in _functions(source.tree):
        given = function.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - 1
        if function.name == "__init__" and count > CONSTRUCTOR_PARAMETERS:
            yield source.at(function, f"{count} parameters, limit {CONSTRUCTOR_PARAMETERS}")


def module_name(source: Source) -> Iterator[str]:
    for part in source.path.with_suffix("").parts:
        vague = VAGUE_NAMES.intersection(part.strip("_").split("_"))
        if vague:
            yield f"{source.path}: `{part}` says nothing ({vague.pop()}); name what it does"


def no_assert(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert):
            yield source.at(node, "assert vanishes under python -O; raise an error instead")


def local_import(source: Source) -> Iterator[str]:
    """Function-local imports whose line, or the line above the group, holds no reason."""
    if source.within("cli"):
        return
    imports = sorted(
        {
            node
            for function in _functions(source.tree)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        },
        key=lambda node: node.lineno,
    )
    excused_lines = set(source.comments)
    for node in imports:
        last = node.end_lineno or node.lineno
        if excused_lines.intersection(range(node.lineno - 1, last + 1)):
            excused_lines.add(last)
        else:
            yield source.at(node, "function-local import without a comment that gives the reason")


def config_read(source: Source) -> Iterator[str]:
    """Configuration read in `__call__` of a layer or model, or in a method it calls on self."""
    if not source.within("layers", "models"):
        return
    for cls in ast.walk(source.tree):
        if isinstance(cls, ast.ClassDef):
            methods = {node.name: node for node in cls.body if isinstance(node, Function)}
            for method in _reached_from_call(methods):
                for node in ast.walk(method):
                    if name := _config_name(node):
                        where = f"{cls.name}.{method.name}"
                        yield source.at(node, f"{where} reads `{name}`; read it in __init__")


def family_name(families: Collection[str]) -> Rule:
    """The rule that a family's name, as identifier or string, stands only in its own file."""
    longest_first = sorted(families, key=len, reverse=True)
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(longest_first)})(?![a-z0-9])")

    def rule(source: Source) -> Iterator[str]:
        allowed = FORMAT_WORDS.get(source.path.as_posix(), ())
        if source.within("models"):
            allowed = (*allowed, source.path.stem)
        prose = _docstrings(source.tree)
        for node in ast.walk(source.tree):
            if node not in prose and not source.within("recipes"):
                words = {word for text in _identifiers(node) for word in pattern.findall(text)}
                words |= set(families).intersection(_dotted_string(node))
                for name in words.difference(allowed):
                    yield source.at(node, f"names the family `{name}`; only its own file may")

    return rule


def forbidden_name(source: Source) -> Iterator[str]:
    """Imports and dotted names that FORBIDDEN lists, and any mention of `allow_pickle`."""
    for node, used in _dotted_uses(source.tree):
        for name, allowed in FORBIDDEN.items():
            if f"{used}.".startswith(f"{name}.") and not source.within(*allowed):
                yield source.at(node, f"`{used}` is not used here")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield source.at(node.value, "no pickle is ever read; leave `allow_pickle` out")


def skipped_test(source: Source) -> Iterator[str]:
    """Tests skipped, or expected to fail, for a reason that is not missing hardware."""
    calls: dict[ast.AST, ast.Call] = {
        node.func: node for node in ast.walk(source.tree) if isinstance(node, ast.Call)
    }
    for node, used in _dotted_uses(source.tree):
        if SKIP.fullmatch(used) and not isinstance(node, ast.Import | ast.ImportFrom):
            reasons = _strings(calls[node]) if node in calls else []
            if not any(HARDWARE.search(reason) for reason in reasons):
                yield source.at(node, f"`{used}` names no missing hardware")


SOURCE_RULES: tuple[Rule, ...] = (
    function_length,
    file_length,
    constructor_parameters,
    module_name,
    no_assert,
    local_import,
    config_read,
    forbidden_name,
)


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _reached_from_call(methods: dict[str, Function]) -> list[Function]:
    reached, waiting = [], ["__call__"]
    while waiting:
        method = methods.get(waiting.pop())
        if method is not None and method not in reached:
            reached.append(method)
            waiting += [
                node.func.attr
                for node in ast.walk(method)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "self"
            ]
    return reached


def _config_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and node.id in CONFIG_NAMES:
        return node.id
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        if node.attr in CONFIG_ATTRIBUTES or text == "self.c":
            return text
    return None


def _strings(node: ast.AST) -> list[str]:
    return [
        inner.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    ]


def _docstrings(tree: ast.AST) -> set[ast.AST]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def _identifiers(node: ast.AST) -> Iterator[str]:
    """The identifiers that a node itself bears, in snake case."""
    for field in ("id", "attr", "arg", "name", "asname", "module"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", value).lower()


def _dotted_string(node: ast.AST) -> list[str]:
    value = getattr(node, "value", None)
    return value.split(".") if isinstance(value, str) else []


def _dotted_uses(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import and every dotted name, each with its full name as far as the imports tell it."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                yield node, f"{prefix}{alias.name}"
                if alias.asname or prefix:
                    known[alias.asname or alias.name] = f"{prefix}{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            root, dot, rest = ast.unparse(node).partition(".")
            yield node, f"{known.get(root, root)}{dot}{rest}"
