"""The system's Chromium without a window, driven by its own protocol over two pipes: nothing to install beside it.

https://chromedevtools.github.io/devtools-protocol: messages are JSON, each ended by a NUL.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


class Page:
    """A page of a browser."""

    def __init__(self, reads: Any, writes: Any):
        self._reads, self._writes, self._numbers = reads, writes, itertools.count()
        self._session: str | None = None
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; errors and logs of the page are collected in `messages` meanwhile."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._writes.write(
            json.dumps({"id": number, "method": method, "params": parameters, **session}).encode() + b"\0"
        )
        self._writes.flush()
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, url: str, width: int = 1300, height: int = 900, dark: bool = False) -> None:
        """Go to an address, in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true, for a minute."""
        end = time.monotonic() + 60
        while not self._holds(expression):
            assert time.monotonic() < end, f"{expression}: {self.value('document.body.innerText')}"
            time.sleep(0.01)

    def _holds(self, expression: str) -> bool:
        try:
            return bool(self.value(f"Boolean({expression})"))
        except AssertionError:  # it is going elsewhere
            return False

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key."""
        code, text = _KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def shoot(self, path: Path) -> None:
        """Write what is seen to a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self._reads.read(1)) != b"\0":
            assert byte, "the browser has ended"
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        if message.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded"}:
            self.messages.append(json.dumps(message["params"]))
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser that has this profile, an empty folder."""
    ours, theirs = os.pipe(), os.pipe()
    # The browser reads from descriptor 3 and writes to 4. Root may not use its sandbox; it sees our own page only.
    script = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{ours[1]}'
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    words = ["bash", "-c", script, str(PROGRAM), *flags, "--hide-scrollbars", f"--user-data-dir={profile}"]
    process = subprocess.Popen(words, pass_fds=(theirs[0], ours[1]), stderr=subprocess.DEVNULL)
    os.close(theirs[0])
    os.close(ours[1])
    with os.fdopen(ours[0], "rb") as reads, os.fdopen(theirs[1], "wb") as writes:
        try:
            page = Page(reads, writes)
            yield page
        finally:
            process.terminate()
            process.wait()
