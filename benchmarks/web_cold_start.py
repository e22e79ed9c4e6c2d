"""A cold start of `fastchat serve`: seconds until the page answers, until a model does, and until a browser can use it.

    python benchmarks/web_cold_start.py [--runs 3] [-- FLAGS OF fastchat serve]

Without flags the demo model is served. The browser is Chromium with an empty storage; the page is usable when its
message box can be typed into and its model is chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from playwright.sync_api import Browser, sync_playwright

POLL_S = 0.05
LIMIT_S = 180.0


@dataclass(frozen=True)
class Times:
    """In seconds since the command was given; `load_s` is how long the browser then took."""

    page_s: float
    ready_s: float
    load_s: float


def main() -> None:
    """Start, measure, stop, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags of fastchat serve")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        times = [measure(browser, arguments.flags) for _ in range(arguments.runs)]
        browser.close()
    for name in ("page_s", "ready_s", "load_s"):
        values = [getattr(each, name) for each in times]
        print(f"{name} median={statistics.median(values):.1f} all={' '.join(f'{value:.1f}' for value in values)}")


def measure(browser: Browser, flags: list[str]) -> Times:
    """One start, with a state of its own."""
    ports = [free_port() for _ in range(4)]
    names = ("--port", "--controller-port", "--worker-port", "--web-port")
    given = [word for pair in zip(names, map(str, ports), strict=True) for word in pair]
    url = f"http://127.0.0.1:{ports[3]}"
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        serving = subprocess.Popen(
            [sys.executable, "-m", "fastchat.serve.main", "serve", *given, *flags],
            env={**os.environ, "FASTCHAT_STATE_DIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            page_s = wait_until(lambda: answers(url), began)
            ready_s = wait_until(lambda: b'"models":["' in read(f"{url}/page/models"), began)
            return Times(page_s, ready_s, load_s(browser, url))
        finally:
            serving.send_signal(signal.SIGTERM)
            serving.wait(60)


def load_s(browser: Browser, url: str) -> float:
    """Seconds of a first visit."""
    context = browser.new_context()
    page = context.new_page()
    began = time.monotonic()
    page.goto(url)
    page.locator("#message textarea").wait_for()
    page.wait_for_function("document.querySelector('#model input')?.value")
    page.fill("#message textarea", "Hello")
    took_s = time.monotonic() - began
    context.close()
    return took_s


def wait_until(condition: Callable[[], bool], began: float) -> float:
    """Seconds since `began` when it first held."""
    while not condition():
        if time.monotonic() - began > LIMIT_S:
            raise SystemExit(f"nothing within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - began


def answers(url: str) -> bool:
    """Whether the page is there."""
    return read(url) != b""


def read(url: str) -> bytes:
    """What is answered; nothing where nobody does."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        body: bytes = answer.read()
        return body
    return b""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
