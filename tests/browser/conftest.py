"""A real headless browser, driven over the WebDriver protocol."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest


class Browser:
    """One session; scripts return what JSON can hold."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=address, timeout=60)
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu",
                            "--disable-dev-shm-usage", "--window-size=1200,1400", "--no-first-run",
                            "--disable-background-networking"]}  # fmt: skip
        wanted = {
            "capabilities": {
                "alwaysMatch": {
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            }
        }
        self._session = f"/session/{self._ask('POST', '/session', wanted)['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._client.request(method, path, json=body)
        value = answer.json()["value"]
        assert answer.is_success, value
        return value

    def open(self, page: Path) -> None:
        self._ask("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        body = {"script": script, "args": list(arguments)}
        return self._ask("POST", f"{self._session}/execute/sync", body)

    def listed(self) -> list[str]:
        """The lines of a page's browser of samples."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll('#list details')].map((d) => d.innerText)"
        )
        return found

    def choose(self, **values: str) -> str:
        """Sets filters of that browser; how many samples it says there are."""
        for name, value in values.items():
            self.run(
                "const f = document.getElementById(arguments[0]); f.value = arguments[1];"
                " f.dispatchEvent(new Event('input', {bubbles: true}))",
                name,
                value,
            )
        count: str = self.run("return document.getElementById('count').innerText")
        return count

    def opened(self) -> list[str]:
        """Opens the first sample; its headings and texts in turn."""
        self.run("document.querySelector('#list details').open = true")
        found: list[str] = self.run(
            "return new Promise((done) => setTimeout(() => done("
            "[...document.querySelectorAll('#list details div > *')].map((e) => e.textContent)), 100))"
        )
        return found

    def log(self) -> list[str]:
        """What the console has of errors and warnings since the last call."""
        body = {"type": "browser"}
        return [entry["message"] for entry in self._ask("POST", f"{self._session}/se/log", body)]

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", self._session)
        self._client.close()


# of a module, not of the session: other tests kill all children of this process
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver; tests/browser/setup.sh installs it on Debian")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"{address}/status").json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)
        session = Browser(address)
        yield session
        session.close()
    finally:
        process.terminate()
        process.wait(10)
