"""A real worker: SGLang, the plugin and SmolLM2 in their own processes, reached over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from vase_sgl.worker_key import WORKER_KEY

TOTAL_SLOTS = 4096
#: What the second worker of these tests asks its callers for.
SECOND_KEY = "a-key-of-the-second-worker"
_FLAGS = (
    "--max-total-tokens",
    str(TOTAL_SLOTS),
    "--max-running-requests",
    "16",
)


class WorkerProcess:
    def __init__(self, model: Path, folder: Path, *flags: str, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"worker-{self.port}.log"
        self._command = [
            *(sys.executable, "-m", "vase_sgl.cli", "worker", "--model-path", str(model)),
            *("--port", str(self.port), *_FLAGS, *flags),
        ]
        self._env = {**os.environ, **env}
        headers = {"Authorization": f"Bearer {env[WORKER_KEY]}"} if WORKER_KEY in env else {}
        self.http = httpx.Client(base_url=self.url, timeout=300, headers=headers)

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=self._env,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self._stop()
        raise AssertionError(f"the worker did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.http.close()
        self._stop()

    def kill(self) -> None:
        """End the worker and its children at once, as a lost machine would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def generate(self, text: str, **request: Any) -> dict[str, Any]:
        """POST /generate; the answer's JSON. Raises for an HTTP error."""
        answer = self.http.post("/generate", json=body(text, **request))
        answer.raise_for_status()
        return dict(answer.json())

    def state(self) -> dict[str, Any]:
        """`internal_states[0]["vase"]` of /server_info."""
        return dict(self.http.get("/server_info").json()["internal_states"][0]["vase"])

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Until every slot is free again."""
        deadline = time.monotonic() + seconds
        while (slots := self.state()["slots"])["available"] != slots["total"]:
            if time.monotonic() > deadline:
                raise AssertionError(f"slots are still taken after {seconds} s: {slots}")
            time.sleep(0.1)


def body(
    text: str,
    *,
    new: int = 100,
    vase: dict[str, Any] | None = None,
    stream: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    parameters = {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True} | sampling
    if vase is not None:
        parameters["custom_params"] = {"vase": vase}
    return {"text": text, "stream": stream, "sampling_params": parameters}
