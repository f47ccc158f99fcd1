"""A browser without a window, over the WebDriver protocol."""

import base64
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Escape": "\ue00c", "Tab": "\ue004"}
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """One tab of a running Chromium."""

    def __init__(self, driver: str):
        chrome = {"args": _ARGUMENTS}
        wanted = {
            "goog:chromeOptions": chrome,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._session, self._network = driver, []
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"{driver}/session/{made['sessionId']}"

    def quit(self) -> None:
        self._call("DELETE", "")

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a function's body returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What is to be seen of the first such element, "" where there is none."""
        find = "const one = document.querySelector(arguments[0]);"
        return self.run(f"{find} return one?.checkVisibility() ? one.innerText : ''", selector)

    def click(self, selector: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{found[_ELEMENT]}/click", {})

    def roles(self, selector: str) -> list[tuple[str, str, str]]:
        """Role and name of all such elements, as assistive technology is told them, and their HTML
        for messages."""
        found = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        told = []
        for one in found:
            path = f"/element/{one[_ELEMENT]}"
            role, name = (
                self._call("GET", path + end) for end in ("/computedrole", "/computedlabel")
            )
            told.append((role, name, self._call("GET", path + "/property/outerHTML")[:200]))
        return told

    def press(self, *keys: str) -> None:
        """Keys held down one after the other, and let go."""
        codes = [KEYS.get(key, key) for key in keys]
        strokes = [{"type": "keyDown", "value": code} for code in codes]
        strokes += [{"type": "keyUp", "value": code} for code in reversed(codes)]
        self._keyboard(strokes)

    def type(self, text: str) -> None:
        kinds = ("keyDown", "keyUp")
        self._keyboard([{"type": kind, "value": one} for one in text for kind in kinds])

    def command(self, name: str, **arguments: Any) -> None:
        """A command of Chromium's own protocol."""
        self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": arguments})

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """The window's size in CSS pixels, and the colours that its user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def errors(self) -> list[str]:
        """What the console has told since the last call."""
        return [one["message"] for one in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[dict[str, Any]]:
        """All that were sent, as Chromium's protocol describes them."""
        for entry in self._call("POST", "/se/log", {"type": "performance"}):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                self._network.append(event["params"]["request"])
        return self._network

    def until[T](self, condition: Callable[[], T], seconds: float = 20) -> T:
        """The first true value of a condition. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.05)
        raise TimeoutError(f"not within {seconds} s; the page says:\n{self.text('body')}")

    def _keyboard(self, strokes: list[dict[str, str]]) -> None:
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self._call("POST", "/actions", {"actions": [keyboard]})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self._session + path, data, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(json.load(error)["value"]["message"]) from None


@contextmanager
def browsing(program: str) -> Iterator[Browser]:
    """A browser, started by the program `chromedriver` and ended with it."""
    command = [program, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            yield from _one(driver)
        finally:
            driver.terminate()


def _one(driver: subprocess.Popen[str]) -> Iterator[Browser]:
    for line in driver.stdout or ():
        if found := re.search(r"started successfully on port (\d+)", line):
            browser = Browser(f"http://127.0.0.1:{found[1]}")
            try:
                yield browser
            finally:
                browser.quit()
            return
    raise RuntimeError("chromedriver did not start")
