"""A page in headless Chromium, controlled over two pipes with the standard library alone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Chromium reads commands from file descriptor 3 and writes replies to 4
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


def find_chromium() -> str | None:
    """The path of the program: ``SHOULDERS_CHROMIUM``, or one on the search path; None if there is none."""
    return os.environ.get("SHOULDERS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One open page.

    Attributes:
        errors: messages of the console, and addresses that could not be loaded.
        requests: every address that the page requested.
    """

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.rest, self.number, self.session = read, write, b"", 0, ""
        self.loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []
        page = self.command("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.command("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its reply."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                result: dict[str, Any] = reply["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], TIMEOUT_S)
            more = os.read(self.read, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError("the browser has stopped, or does not reply")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        params = message.get("params", {})
        self.loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(json.dumps(params)[:400])
        return message

    def open(self, file: Path, width: int, height: int = 900, scheme: str = "light", scale: float = 1) -> None:
        """Load a file in a window of ``width`` x ``height`` px."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.loaded = False
        self.command("Page.navigate", url=file.resolve().as_uri())
        while not self.loaded:
            self._next()

    def value(self, code: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.command("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Write the page as PNG, all of it or the visible part."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file: Path) -> None:
        """Write the page as it is printed."""
        file.write_bytes(base64.b64decode(self.command("Page.printToPDF", printBackground=True)["data"]))


@contextmanager
def browser(program: str) -> Iterator[Tab]:
    """A tab of a new browser with an empty profile."""
    to_read, to_write = os.pipe()  # commands
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        to_read, from_write = _above(to_read), _above(from_write)
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LAUNCHER,
                str(to_read),
                str(from_write),
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-quic",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            pass_fds=(to_read, from_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Tab(from_read, to_write)
        finally:
            os.close(to_write)
            process.terminate()
            process.wait(timeout=20)
            os.close(from_read)


def _above(descriptor: int) -> int:
    """The same pipe with a descriptor other than 3 and 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved
