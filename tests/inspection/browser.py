"""A real headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}


def executable() -> str | None:
    """The browser, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Tab:
    """One open page. `requests` are the URLs it asked for, `problems` its errors."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self.requests: list[str] = []
        self.problems: list[str] = []

    async def _read(self) -> None:
        async for message in self._socket:
            content = json.loads(message.data)
            match content.get("method"):
                case None:
                    answer = self._answers.pop(content["id"])
                    if not answer.done():  # given up
                        answer.set_result(content)
                case "Network.requestWillBeSent":
                    self.requests.append(content["params"]["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.problems.append(json.dumps(content["params"]))
                case "Log.entryAdded" if content["params"]["entry"]["level"] == "error":
                    self.problems.append(json.dumps(content["params"]))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        self._number += 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[self._number] = answer
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        async with asyncio.timeout(120):
            content = await answer
        assert "error" not in content, content
        return dict(content["result"])

    async def open(self, page: Path, *, dark: bool = False) -> None:
        """Load the page and wait until it shows a round."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        await self.size(1180, 900)
        await self.call("Page.navigate", url=page.absolute().as_uri())
        await self.until("document.documentElement?.dataset.round !== undefined")

    async def size(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        async with asyncio.timeout(60):
            while not await self.evaluate(expression):
                await asyncio.sleep(0.05)

    async def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key]
            )

    async def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """A fresh browser with one empty tab; its profile lies in `folder`."""
    program = executable()
    assert program is not None, "no chromium"
    process = await asyncio.create_subprocess_exec(
        program,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
        *("--hide-scrollbars", f"--user-data-dir={folder}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _port(folder / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                targets = [one for one in await answer.json() if one["type"] == "page"]
            # No limit: a screenshot is one message.
            async with session.ws_connect(
                targets[0]["webSocketDebuggerUrl"], max_msg_size=0
            ) as socket:
                yield Tab(socket)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        await process.wait()


async def _port(file: Path) -> str:
    async with asyncio.timeout(60):
        while not file.exists() or not file.read_text():
            await asyncio.sleep(0.1)
    return file.read_text().splitlines()[0]
