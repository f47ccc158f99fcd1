"""Configuration: overrides, what differs, and messages that name key, value and the nearest key."""

import shlex
from typing import Annotated, Literal

import pydantic
import pytest

from ropewalk.core.config import Config, flatten, leaf_fields, override, read_yaml
from ropewalk.core.errors import ConfigError


class Inner(Config):
    rate: float = 0.1
    steps: int = pydantic.Field(default=5, ge=1)


class Flat(Config):
    kind: Literal["flat"]


class Deep(Config):
    kind: Literal["deep"]
    depth: int = 2


class Named(Config):
    path: str | tuple[str, ...]
    inner: Inner = Inner()


class Outer(Config):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    shape: Annotated[Flat | Deep, pydantic.Field(discriminator="kind")] = Deep(kind="deep")
    sizes: dict[str, int] = pydantic.Field(default_factory=dict)
    several: tuple[Inner, ...] = ()
    files: tuple[Named, ...] = ()
    words: tuple[str, ...] = pydantic.Field(default=("a",), min_length=1)


def refusal(values, config=Outer):
    with pytest.raises(ConfigError) as raised:
        config.parse(values, "recipe.yml")
    message = str(raised.value)
    assert message.startswith("recipe.yml: ") and "\n" not in message
    return message


def test_a_config_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        Outer(name="a").name = "b"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["key `name` is required"]),
        ({"name": "a", "iner": {}}, ["unknown key `iner`", "did you mean `inner`?"]),
        ({"name": "a", "inner": {"rat": 1}}, ["`inner.rat`", "did you mean `inner.rate`?"]),
        ({"name": "a", "stepps": 1}, ["`stepps`", "steps`?"]),
        ({"name": "a", "zzzzqqq": 1}, ["unknown key `zzzzqqq`", "--print-config all"]),
        (
            {"name": "a", "inner": {"steps": 0}},
            ["key `inner.steps` = 0", "greater than or equal to 1"],
        ),
        ({"name": "a", "inner": {"rate": "fast"}}, ["`inner.rate` = 'fast'", "number"]),
        ({"name": "a", "shape": {"kind": "dep"}}, ["shape", "dep", "'flat', 'deep'"]),
        ({"name": 3, "inner": {"steps": -1}}, ["`name` = 3", "; key `inner.steps` = -1"]),
        ({"name": "a", "sizes": 3}, ["key `sizes` = 3: a mapping is expected"]),
        ({"name": "a", "sizes": {"x": "y"}}, ["key `sizes.x` = 'y'"]),
        ({"name": "a", "words": ()}, ["key `words` = (): at least 1"]),
        ({"name": "a", "files": 3}, ["a list of mappings with the keys path, inner is expected"]),
        ({"name": "a", "files": ["f"]}, ["key `files.0` = 'f': a mapping", "e.g. {path: f}"]),
        ({"name": "a", "files": [{"path": 3}]}, ["key `files.0.path` = 3"]),
    ],
)
def test_a_mistake_is_named(values, words):
    message = refusal(values)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("files", "two words", [{"path": "two words"}]),
        ("files", {"path": "f"}, [{"path": "f"}]),
        ("words", "one", ["one"]),
        ("inner", 3, {"rate": 3}),
        ("maybe", 0.5, {"rate": 0.5}),
    ],
)
def test_the_example_of_a_misshapen_value_works(key, value, meant):
    message = refusal({"name": "a", key: value})
    (assignment,) = shlex.split(message.partition("e.g. ")[2])
    config = Outer.parse(override({"name": "a"}, [assignment]))
    assert config == Outer.parse({"name": "a", key: meant})


def test_a_list_with_a_bad_entry_is_told_once():
    assert refusal({"name": "a", "words": [3]}).count("key `") == 1


def test_at_most_five_mistakes_are_listed():
    assert refusal({f"wrong{i}": i for i in range(9)}).count("; ") <= 10


def test_changes_are_what_differs_from_the_defaults():
    assert Outer(name="a").changes() == {"name": "a"}
    changed = Outer.parse({"name": "a", "inner": {"rate": 0.1, "steps": 7}})
    assert changed.changes() == {"name": "a", "inner": {"steps": 7}}


def test_changes_from_a_base_nest_like_the_recipe():
    base = Outer(name="a")
    other = Outer.parse({"name": "a", "inner": {"steps": 7}, "sizes": {"x": 1}})
    assert other.changes(base) == {"inner": {"steps": 7}, "sizes": {"x": 1}}
    assert base.changes(base) == {}


def test_changes_make_the_config_again():
    config = Outer.parse({"name": "a", "maybe": {"steps": 3}, "shape": {"kind": "flat"}})
    assert Outer.parse(config.changes()) == config


def test_leaf_fields_open_configs_but_not_containers():
    names = [name for name, _ in leaf_fields(Outer)]
    assert names == [
        "name", "inner.rate", "inner.steps", "maybe.rate", "maybe.steps",
        "shape.kind", "shape.kind", "shape.depth", "sizes", "several", "files", "words",
    ]  # fmt: skip
    assert dict(leaf_fields(Outer))["inner.steps"] is int


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3), ("a.b=1e-3", 1e-3), ("a.b=true", True), ("a.b=null", None), ("a.b=", None),
        ("a.b=[1, 2]", [1, 2]), ("a.b={x: 1}", {"x": 1}), ("a.b=x=y", "x=y"),
        ("a.b=fsdp", "fsdp"), ("a.b=1.5", 1.5), (" a.b =2", 2),
    ],
)  # fmt: skip
def test_an_override_is_read_as_yaml(text, value):
    assert override({}, [text]) == {"a": {"b": value}}


def test_overrides_apply_in_order_and_leave_the_input_alone():
    values = {"a": {"b": 1, "c": 2}, "d": 3}
    assert override(values, ["a.b=5", "a.b=6", "e.f.g=7"]) == {
        "a": {"b": 6, "c": 2}, "d": 3, "e": {"f": {"g": 7}},
    }  # fmt: skip
    assert values == {"a": {"b": 1, "c": 2}, "d": 3}


def test_a_scalar_in_the_way_becomes_a_mapping():
    assert override({"layout": "fsdp"}, ["layout.rules=tensor"]) == {"layout": {"rules": "tensor"}}


@pytest.mark.parametrize("text", ["steps", "=3", ""])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(ConfigError, match="key=value"):
        override({}, [text])


def test_flatten_gives_dotted_keys_and_keeps_empty_mappings():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": {}}) == {"a.b": 1, "a.c.d": 2, "e": {}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1,\nb: 2", ["not valid YAML", "line 2"]),
        (b"- 1\n- 2\n", ["mapping", "list"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (b"a: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_name(tmp_path, content, words):
    path = tmp_path / "recipe.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_yaml(path)
    message = str(raised.value)
    assert all(word in message for word in [str(path), *words]), message
    assert "\n" not in message


def test_a_file_that_is_not_there_is_refused_and_an_empty_one_is_no_values(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yml"):
        read_yaml(tmp_path / "none.yml")
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yml") == {}


def test_a_bare_text_is_what_its_shorthand_says():
    short = {"layout": "rules", "model": "preset"}
    opened = {"layout": {"rules": "fsdp"}, "model": {"preset": "small"}}
    assert override({"layout": "fsdp", "model": {"family": "x"}}, ["model=small"], short) == opened
    assert override({"layout": "fsdp", "model": "small"}, [], short) == opened
    assert override({"inner": {"layout": "a"}}, ["model=3"], short) == {
        "inner": {"layout": "a"},
        "model": 3,
    }


def test_a_shorthand_that_is_opened_keeps_what_it_said():
    values = {"layout": "fsdp_tensor", "other": "text"}
    opened = override(values, ["layout.mesh={fsdp: -1}", "other.key=1"], {"layout": "rules"})
    assert opened["layout"] == {"rules": "fsdp_tensor", "mesh": {"fsdp": -1}}
    assert opened["other"] == {"key": 1}


def test_numbers_that_are_none_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"inner\.rate"):
            Outer.parse({"name": "x", "inner": {"rate": value}})
