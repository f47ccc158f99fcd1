"""The page at `/`, as people use it: a real browser, a real server, a tiny model that writes what
a grammar dictates."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ropewalk.serve import door
from ropewalk.serve.openai import Server
from tests.browser.conftest import ONLINE
from tests.browser.driver import Browser

THOUGHT = "Three strands, laid to the right. I should be short."
ANSWER = """A rope is made in a ropewalk: a long, narrow shed where strands are laid out at full \
length and then twisted together.

```python
def turns(length: float, pitch: float) -> int:
    return round(length / pitch)
```

That is <b>all</b> of it: see `turns`."""
HEADINGS = "return [...document.querySelectorAll('article h2')].map((one) => one.innerText)"
# Of everything with text of its own: the ratio of WCAG 2.2 between it and what lies behind it.
CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map(
  (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const [r, g, b, a = 1] = numbers(getComputedStyle(node).backgroundColor);
    if (a === 1) return [r, g, b];
    if (a) throw new Error('half transparent');
  }
  return [255, 255, 255];
};
const ratio = (a, b) => {
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const told = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  if (!node.checkVisibility() || node.closest('.unseen, script')) continue;
  const name = `${node.tagName} ${node.className} ${node.textContent.trim().slice(0, 30)}`;
  const style = getComputedStyle(node);
  if (own) told.push([name, 4.5, ratio(numbers(style.color), behind(node))]);
  if (!/^(INPUT|TEXTAREA)$/.test(node.tagName)) continue;
  const hint = getComputedStyle(node, '::placeholder').color;
  told.push([`${name} placeholder`, 4.5, ratio(numbers(hint), behind(node))]);
  const edge = numbers(style.borderTopColor);
  told.push([`${name} border`, 3, ratio(edge, behind(node.parentElement))]);
}
return told;
"""


def literally(text: str) -> dict[str, Any]:
    """Fields of a request whose answer is this text."""
    pattern = re.sub(r"([\\.*+?()\[\]{}|^$/])", r"\\\1", text)
    return {"response_format": {"type": "regex", "regex": pattern}}


def further(page: Browser, fields: dict[str, Any]) -> None:
    """Fills in the settings' further fields."""
    fill = "const field = document.querySelector('[name=extra]'); field.value = arguments[0];"
    page.run(
        f"{fill} field.dispatchEvent(new Event('input', {{bubbles: true}}))", json.dumps(fields)
    )


def say(page: Browser, text: str) -> None:
    page.run("document.querySelector('#box').focus()")
    page.type(text)
    page.press("Enter")


def finished(page: Browser) -> str:
    """The last answer, when it is whole."""
    page.until(lambda: page.run(
        "return document.querySelector('#stop').hidden && document.querySelector('article')"
    ), 60)  # fmt: skip
    return last(page)


def last(page: Browser) -> str:
    return page.text("article:last-child > .text")


def facts(page: Browser) -> str:
    """What is told under the last answer."""
    return page.text("article:last-child .facts")


def bodies(page: Browser) -> list[dict[str, Any]]:
    """What was posted, one after the other."""
    return [json.loads(one["postData"]) for one in page.requests() if one["method"] == "POST"]


def shown(page: Browser, text: str, selector: str = "body") -> bool:
    return bool(page.until(lambda: text in page.text(selector)))


def reached(page: Browser, name: str, *keys: str) -> None:
    """Goes through the page with a key, until the focus is at something of this name."""
    for _ in range(20):
        page.press(*keys)
        at = page.run("""
            const at = document.activeElement, {outlineStyle, outlineWidth} = getComputedStyle(at);
            return [at.innerText || at.id || at.name, outlineStyle, parseFloat(outlineWidth)]""")
        assert at[1] != "none" and at[2] >= 2, f"the focus is not seen at {at}"
        if at[0] == name:
            return
    raise LookupError(f"{name} is not reached")


def test_an_answer_comes_piece_by_piece(page, slow):
    further(page, literally(f"<think>{THOUGHT}</think>{ANSWER}"))
    page.run("""
        window.said = [];
        new MutationObserver(() => said.push(document.querySelector('#said').textContent))
          .observe(document.querySelector('#said'), {childList: true})""")
    say(page, "How is a rope made?")
    page.until(lambda: len(page.text("details .text")) > 5)
    assert THOUGHT.startswith(page.text("details .text"))
    early = page.until(lambda: last(page))
    assert "about" in facts(page) and "tokens/s" in facts(page)
    whole = finished(page)
    assert len(early) < len(whole) and whole.startswith(early[:20])
    code = "def turns(length: float, pitch: float) -> int:\n    return round(length / pitch)"
    plain = re.sub(r"```python\n(.*?)\n```", r"\1", ANSWER, flags=re.S).replace("`", "")
    assert re.sub(r"\n+", "\n", whole) == re.sub(r"\n+", "\n", plain)
    assert page.text("article pre") == code
    assert page.run("return document.querySelector('article b')") is None
    assert page.text("details .text") == ""
    page.click("article summary")
    assert page.text("details .text") == THOUGHT
    assert page.run("return said") == ["Waiting for the answer.", f"Answer: {ANSWER}"]
    assert page.errors() == []


def test_settings_reach_the_request_and_are_remembered(page, address):
    asked = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "max_tokens": 3, "seed": 7,
    }  # fmt: skip
    page.click("#open")
    for name, value in {**asked, "system": "Be brief."}.items():
        page.click(f"[name={name}]")
        page.type(str(value))
    page.press("Escape")
    say(page, "Hello")
    told = finished(page)
    (body,) = bodies(page)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert body == {"model": "tiny", "messages": messages, **asked, **stream}
    data = json.dumps({"model": "tiny", "messages": messages, **asked}).encode()
    alone = urllib.request.Request(f"{address}/v1/chat/completions", data)
    alone.add_header("content-type", "application/json")
    with urllib.request.urlopen(alone, timeout=60) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"].strip() == told
    assert "3 tokens" in facts(page) and "cut" in facts(page)
    page.open(address)
    assert page.run("return document.querySelector('[name=seed]').value") == "7"
    assert finished(page) == told


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop_frees_the_slot(page, server: Server, slow, by):
    further(page, {"response_format": {"type": "regex", "regex": "[a-z]{900}"}})
    say(page, "Go on")
    page.until(lambda: len(last(page)) > 5)
    assert server.host.metrics.value("num_requests_running") == 1
    page.press("Escape") if by == "key" else page.click("#stop")
    page.until(lambda: server.host.metrics.value("num_requests_running") == 0, 2)
    kept = finished(page)
    assert 5 < len(kept) < 900 and "stopped" in facts(page)
    page.until(lambda: page.text("#running") == "0")
    further(page, literally("Again."))
    say(page, "And now?")
    page.until(lambda: last(page) == "Again.")
    finished(page)
    assert [m["content"] for m in bodies(page)[-1]["messages"]] == ["Go on", kept, "And now?"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("full", "has too much to do: 1000 sequences are being served or wait, and 1 more are"),
        ("full", "Try again in 1 s."),
        ("draining", "takes no requests now: the server is shutting down; try another. Try again"),
        ("offline", "The server cannot be reached."),
    ],
)
def test_an_error_is_told_and_nothing_is_lost(page, server: Server, monkeypatch, kind, told):
    page.until(lambda: page.text("#model") == "tiny")
    with monkeypatch.context() as patch:
        if kind == "full":
            patch.setattr(server.host.service, "open", 1000)
        if kind == "draining":
            patch.setattr(server, "draining", True)
        if kind == "offline":
            page.command("Network.emulateNetworkConditions", **ONLINE | {"offline": True})
        say(page, "Are you there?")
        assert shown(page, told, "article [role=alert]")
        assert page.text("article.user .text") == "Are you there?"
    page.command("Network.emulateNetworkConditions", **ONLINE)
    further(page, literally("I am."))
    page.click("article:last-child button")
    page.until(lambda: last(page) == "I am.")
    finished(page)
    assert [m["content"] for m in bodies(page)[-1]["messages"]] == ["Are you there?"]
    assert page.text("article [role=alert]") == ""


def test_an_error_is_an_alert_only_where_it_happens(page, address):
    page.run("""
        window.alerts = [];
        const found = (node) => node.nodeType === 1 ? [node, ...node.querySelectorAll('*')] : [];
        new MutationObserver((changes) => {
          for (const {target, addedNodes} of changes) for (const node of addedNodes) {
            const around = target.closest('[role=alert]');
            const all = around ? [around] : found(node).filter((one) => one.role === 'alert');
            alerts.push(...all.map((one) => one.textContent).filter(Boolean));
          }
        }).observe(document.body, {childList: true, subtree: true})""")
    left = "return document.querySelectorAll('article [role=alert]:not(:empty)').length"
    for count in (1, 2):
        further(page, {"temperature": 9})
        say(page, "Hello")
        assert shown(page, "answered 400", "article:last-child [role=alert]")
        assert page.run(left) == 1 and len(page.run("return alerts")) == count
        further(page, literally("Yes."))
        say(page, "And now?")
        page.until(lambda: last(page) == "Yes.")
        finished(page)
        assert page.run(left) == 0 and "answered 400" in page.text("article .wrong")
    further(page, {"temperature": 9})
    say(page, "Hello")
    assert shown(page, "answered 400", "article:last-child [role=alert]")
    page.click("#new")
    page.click("#back")
    assert len(page.run("return alerts")) == 3 and page.run(left) == 0
    page.open(address)
    assert shown(page, "answered 400", "article:last-child .wrong") and page.run(left) == 0


def test_what_the_server_refuses_is_told_in_its_words(page):
    further(page, {"temperature": 9})
    say(page, "Hello")
    assert shown(page, "answered 400: temperature: Input should be less than or equal to 2.")


def test_an_answer_that_breaks_off_is_kept(page, server: Server, monkeypatch, slow):
    engine = server.host.service.engine
    further(page, {"response_format": {"type": "regex", "regex": "[a-z]{900}"}})
    say(page, "Go on")
    page.until(lambda: len(last(page)) > 5)
    with monkeypatch.context() as patch:
        for step in ("prefill", "generate"):
            patch.setattr(engine, step, None)
        assert shown(page, "could not go on: the engine failed", "article [role=alert]")
    assert len(finished(page)) > 5


def test_a_key_is_asked_for_where_the_server_wants_one(page, server: Server, address, monkeypatch):
    monkeypatch.setattr(door, "_OPEN", (*door._OPEN, "/"))
    with monkeypatch.context() as patch:
        patch.setattr(server.app, "_keys", door.Door(None, ("secret",))._keys)
        page.open(address)
        assert shown(page, "The server wants a key.")
        page.type("wrong")
        page.press("Enter")
        assert shown(page, "did not take this key")
        page.run("document.querySelector('#secret').select()")
        page.type("secret")
        page.press("Enter")
        page.until(lambda: page.text("#model") == "tiny" and not page.text("#key"))
        patch.setattr(server.app, "_keys", door.Door(None, ("other",))._keys)
        further(page, literally("Known."))
        say(page, "Hello")
        page.until(lambda: page.text("#key"))
        page.type("other")
        page.press("Enter")
        page.until(lambda: last(page) == "Known.")
        assert page.run("return sessionStorage['ropewalk.key']") == '"other"'
        assert "other" not in page.run("return JSON.stringify({...localStorage})")


def test_a_call_is_shown_and_its_result_is_sent(page, server: Server):
    kinds = {"city": {"enum": ["Oslo"]}, "days": {"enum": [3]}}
    schema = {
        "type": "object", "properties": kinds, "required": [*kinds], "additionalProperties": False,
    }  # fmt: skip
    function = {"name": "forecast", "parameters": schema}
    # Without an h it cannot begin to think.
    (h,) = server.host.tokenizer.encode("h")
    fields = {
        "tools": [{"type": "function", "function": function}], "tool_choice": "required",
        "parallel_tool_calls": False, "logit_bias": {str(h): -100},
    }  # fmt: skip
    further(page, fields)
    say(page, "What will it be like?")
    finished(page)
    assert page.text(".call p") == "Calls forecast"
    assert json.loads(page.text(".call pre")) == {"city": "Oslo", "days": 3}
    further(page, literally("Rain."))
    page.click(".call textarea")
    page.type("rain, 4 degrees")
    page.click(".call + button")
    page.until(lambda: last(page) == "Rain.")
    called, result = bodies(page)[-1]["messages"][1:]
    assert called["tool_calls"][0]["function"]["name"] == "forecast"
    assert (result["role"], result["content"]) == ("tool", "rain, 4 degrees")
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]


def test_everything_goes_with_the_keyboard_alone(page):
    further(page, literally("Yes."))
    page.type("One")
    page.press("Shift", "Enter")
    page.type("two")
    page.press("Enter")
    finished(page)
    reached(page, "Retry", "Shift", "Tab")
    page.press("Enter")
    page.until(lambda: len(bodies(page)) == 2)
    finished(page)
    assert bodies(page)[0] == bodies(page)[1]
    page.type("a draft")
    reached(page, "Edit", "Shift", "Tab")
    page.press("Enter")
    page.type(" three")
    page.press("Escape")
    assert page.run("return document.querySelector('#box').value") == "a draft"
    reached(page, "Edit", "Shift", "Tab")
    page.press("Enter")
    page.type(" four")
    page.press("Enter")
    page.until(lambda: len(bodies(page)) == 3)
    finished(page)
    assert [m["content"] for m in bodies(page)[2]["messages"]] == ["One\ntwo four"]
    reached(page, "Settings", "Shift", "Tab")
    page.press("Enter")
    reached(page, "top_p", "Tab")
    page.press("Escape")
    assert page.run("return document.activeElement.id") == "open"
    reached(page, "New conversation", "Shift", "Tab")
    page.press("Enter")
    assert page.run(HEADINGS) == []
    reached(page, "Back to the last conversation", "Shift", "Tab")
    page.press("Enter")
    assert page.run(HEADINGS) == ["You", "tiny"]


@pytest.mark.parametrize(("touch", "to"), [(False, "box"), (True, "scroll")])
def test_the_focus_is_not_lost_with_the_stop_button(page, slow, touch, to):
    if touch:
        page.run("window.matchMedia = () => ({matches: true})")
    further(page, literally(ANSWER))
    say(page, "How is a rope made?")
    page.until(lambda: last(page))
    reached(page, "Stop", "Tab")
    finished(page)
    assert page.run("return document.activeElement.id") == to


def test_what_stays_keeps_focus_and_selection(page, slow):
    further(page, literally(ANSWER))
    say(page, "How is a rope made?")
    finished(page)
    page.run("""
        window.kept = [...document.querySelectorAll('article *:not(button)')];
        const buttons = [...document.querySelectorAll('button')];
        window.copy = buttons.find((one) => one.innerText === 'Copy')""")
    say(page, "And a wire?")
    page.until(lambda: last(page))
    page.run("""
        copy.focus();
        getSelection().selectAllChildren(document.querySelectorAll('.text p')[1])""")
    selected = page.run("return String(getSelection())")
    assert len(selected) > 20
    finished(page)
    assert page.run("return document.activeElement === copy")
    assert page.run("return String(getSelection())") == selected
    assert page.run("return kept.length > 10 && kept.every((one) => one.isConnected)")
    further(page, literally("No."))
    reached(page, "Retry", "Tab")
    page.press("Enter")
    page.until(lambda: last(page) == "No.")
    finished(page)
    assert page.run("return kept.every((one) => one.isConnected)")
    assert page.run(HEADINGS) == ["You", "tiny"] * 2


def test_the_numbers_of_the_server_are_explained(page):
    page.run("document.querySelector('#box').focus()")
    reached(page, "?", "Shift", "Tab")
    assert page.roles("#meanings summary")[0][1] == "What the numbers mean"
    assert page.text("#meanings div") == ""
    page.press("Enter")
    told = page.text("#meanings div")
    names = page.run(
        "return [...document.querySelectorAll('#server dt')].map((one) => one.innerText)"
    )
    assert len(names) == 5
    assert [line.split(": ")[0] for line in told.splitlines() if line] == names
    page.look(320, 800)
    assert page.run("return document.documentElement.scrollWidth") == 320
    page.press("Enter")
    assert page.text("#meanings div") == ""


def test_the_speed_of_the_whole_server_is_shown(page, server: Server):
    page.until(lambda: page.text("#speed") == "0")
    server.host.metrics.generated.inc(10_000)
    speed = page.until(lambda: int(page.text("#speed")))
    assert 2000 < speed <= 10_000  # 5000 at a look every 2 s
    page.until(lambda: page.text("#speed") == "0")


@pytest.mark.parametrize("agrees", [False, True])
def test_a_system_message_is_not_lost_without_a_question(page, address, agrees):
    page.run("""
        window.asked = 0;
        window.confirm = () => { asked += 1; return arguments[0]; }""", agrees)  # fmt: skip
    page.click("#open")
    for name, value in {"seed": "7", "system": "Be brief."}.items():
        page.click(f"[name={name}]")
        page.type(value)
    page.click("[type=reset]")
    values = "return ['seed', 'system'].map((name) => document.forms.options[name].value)"
    left = ["", ""] if agrees else ["7", "Be brief."]
    page.until(lambda: page.run(values) == left)
    page.run("document.forms.options.system.value = ''")
    page.click("[type=reset]")
    assert page.run("return asked") == 1 and page.run(values) == ["", ""]
    page.open(address)
    assert page.run(values) == ["", ""]


def test_assistive_technology_is_told_what_everything_is(page):
    page.until(lambda: page.text("#model") == "tiny")
    roles = {role for role, _, _ in page.roles("header, main, section, form")}
    assert {"banner", "main", "region", "form"} <= roles
    say(page, "Hello")
    finished(page)
    page.run("document.querySelector('#key').hidden = false")
    hidden = ":not([hidden] *, [hidden], dialog *)"
    controls = page.roles(f":is(button, input, textarea, section, form, [tabindex]){hidden}")
    page.click("#open")
    controls += page.roles("dialog, dialog :is(button, input, textarea)")
    assert len(controls) > 20
    assert not [html for _, name, html in controls if not name.strip()]
    ids = page.run("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    assert page.run("return document.documentElement.lang") == "en"


def test_the_end_stays_in_sight_when_the_window_changes(page):
    page.look(1280, 800)
    for _ in range(2):
        further(page, literally(ANSWER))
        say(page, "How is a rope made? " * 8)
        finished(page)
    below = """const s = document.querySelector('#scroll');
        const below = s.scrollHeight - s.scrollTop - s.clientHeight;
        return s.scrollHeight > s.clientHeight && below < 1"""
    for width, height in ((360, 400), (360, 320), (1280, 320)):
        page.look(width, height)
        page.until(lambda: page.run(below))
    page.run("document.querySelector('#scroll').scrollTop = 0")
    page.look(360, 800)
    assert page.run("return document.querySelector('#scroll').scrollTop") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_every_light_and_width(page, tmp_path: Path, scheme):
    page.look(1280, 800, scheme)
    page.until(lambda: page.text("#speed") == "0")
    contrast = page.run(CONTRAST)
    page.picture(tmp_path / f"{scheme}-empty.png")
    further(page, literally(f"<think>{THOUGHT}</think>{ANSWER}"))
    say(page, "How is a rope made?")
    finished(page)
    further(page, {"temperature": 9})
    say(page, "And a wire?")
    assert shown(page, "answered 400")
    page.click("article summary")
    page.run("document.querySelector('#key').hidden = false")
    for width in (1280, 360):
        page.look(width, 800, scheme)
        assert page.run("return document.documentElement.scrollWidth") == width
        contrast += page.run(CONTRAST)
        page.picture(tmp_path / f"{scheme}-{width}.png")
        page.run("document.querySelector('#scroll').scrollTop = 0")
        page.click("#meanings summary")
        contrast += page.run(CONTRAST)
        page.picture(tmp_path / f"{scheme}-{width}-top.png")
        page.click("#meanings summary")
        page.click("#open")
        contrast += page.run(CONTRAST)
        page.picture(tmp_path / f"{scheme}-{width}-settings.png")
        page.press("Escape")
    weak = {(name, round(ratio, 2)) for name, least, ratio in contrast if ratio < least}
    assert len(contrast) > 100 and not weak
