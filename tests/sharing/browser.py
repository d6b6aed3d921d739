"""Chromium without a window, spoken to by its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu")
FLAGS += ("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage")


class Browser:
    """One tab. `requests` are the addresses that it has asked for."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        (take, self.to), (self.answers, give) = os.pipe(), os.pipe()
        # the protocol's pipes are 3 and 4; the shell moves them there, whatever their numbers are
        script = f'exec "$0" "$@" 3<&{take} 4>&{give}'
        line = ["bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(line, pass_fds=(take, give), **quiet)
        os.close(take)
        os.close(give)
        self.number, self.rest, self.session = 0, b"", {}
        self.requests: list[str] = []
        tabs = self.ask("Target.getTargets")["targetInfos"]
        tab = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=tab, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.ask("Network.enable")

    def ask(self, method: str, seconds: float = 60, **params: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while True:
            while b"\0" not in self.rest:
                ready = select.select([self.answers], [], [], max(0, end - time.monotonic()))[0]
                if not ready or not (part := os.read(self.answers, 2**20)):
                    raise TimeoutError(f"chromium gave no answer to {method}")
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str, width: int, height: int = 900) -> None:
        """Go to an address in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{script}; the page says: {self.run('document.body.innerText')}"
                )
            time.sleep(0.1)
        return value

    def type(self, place: str, text: str) -> None:
        """Type a text and Enter into what a CSS selector finds."""
        self.run(f"document.querySelector({place!r}).focus()")
        self.ask("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.ask("Input.dispatchKeyEvent", type=kind, **key)

    def save_picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.answers)
