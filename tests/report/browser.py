"""A page in headless Chromium, driven over two pipes: no package beside the standard library."""

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

PATIENCE = 60  # s
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# a browser reads what it is to do from file 3 and answers on file 4
PLACE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


def find_chromium() -> str | None:
    """The program: ``SHOULDERS_CHROMIUM``, or one on the path; None where there is none."""
    return os.environ.get("SHOULDERS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One open page.

    Attributes:
        trouble: what the console said, and what could not be loaded.
        asked: every address that the page asked for.
    """

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.rest, self.number, self.session = read, write, b"", 0, ""
        self.loaded = False
        self.trouble: list[str] = []
        self.asked: list[str] = []
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Do one thing and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], PATIENCE)
            more = os.read(self.read, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError("the browser is gone, or says nothing any more")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        params = message.get("params", {})
        self.loaded |= message.get("method") == "Page.loadEventFired"
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.trouble.append(json.dumps(params)[:400])
        return message

    def open(self, file: Path, width: int, height: int = 900, scheme: str = "light", scale: float = 1) -> None:
        """Load a file in a window of so many px."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.loaded = False
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self.loaded:
            self._next()

    def value(self, code: str) -> Any:
        """What an expression gives inside the page."""
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """The page as PNG, all of it or what is in the window."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file: Path) -> None:
        """The page as printed."""
        file.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))


@contextmanager
def browser(program: str) -> Iterator[Tab]:
    """A tab of a fresh browser without a profile of its own."""
    to_read, to_write = os.pipe()  # what it reads from us
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        to_read, from_write = _above(to_read), _above(from_write)
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                PLACE,
                str(to_read),
                str(from_write),
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
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
    """The same pipe under a number that is not 3 or 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved
