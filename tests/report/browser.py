"""A headless Chromium, spoken to through two pipes (its DevTools protocol): no port, no network."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NO_BROWSER = "no chromium, chromium-browser or google-chrome here to look at the page with"
_SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
    "--remote-debugging-pipe",
)
# the protocol's pipes are the descriptors 3 and 4
_LAUNCH = """import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])"""
_PATIENCE = 120  # seconds without a word from the browser after which it is given up


@dataclass
class Browser:
    """One tab. ``events`` are what the browser told unasked since the last page was opened."""

    read: int
    write: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0
    buffer: bytes = b""

    def ask(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def wait_for(self, event: str) -> None:
        """Until the browser has told that."""
        while not any(found["method"] == event for found in self.events):
            self._next()

    def _next(self) -> dict[str, Any]:
        """The next message; one that is no answer is an event and is kept."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser has ended"
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page: Path, *, width: int = 1000, dark: bool = False) -> None:
        """Show a file in a window of that width, for a reader of that taste."""
        self.events.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        taste = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[taste])
        self.ask("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> Image.Image:
        """The whole page, also what one would scroll to."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself included."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the page's scripts threw, and what the browser refused to load."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e["method"] in kinds]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in that folder, ended with the block."""
    assert PROGRAM is not None
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    command = (PROGRAM, *_SWITCHES, f"--user-data-dir={profile}", "about:blank")
    process = subprocess.Popen(
        (sys.executable, "-c", _LAUNCH, str(their_read), str(their_write), *command),
        pass_fds=(their_read, their_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_read)
    os.close(their_write)
    try:
        found = Browser(our_read, our_write)
        target = found.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = found.ask("Target.attachToTarget", targetId=target, flatten=True)
        found.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            found.ask(f"{domain}.enable")
        yield found
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(our_read)
        os.close(our_write)
