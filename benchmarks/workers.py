"""Worker processes: of any command, and of the arms: stock SGLang, with the plugin, with timers."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks.environment import ROOT
from vase_sgl import parent_watch

_MODULES = {
    "stock": "benchmarks.stock_worker",
    "vase": "vase_sgl.engine.server",
    "timed": "benchmarks.timed_worker",
}
_START_SECONDS = 900
_STOP_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """kind: `stock`, `vase` or `timed`. flags: beside those that all have. env: beside ours."""

    kind: str
    flags: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    def command(self, model: Path, *, dummy: bool, gpu: bool) -> list[str]:
        """The command line, but for the port.

        No tokenizer: prompts are token ids, and no arm pays for text.
        """
        shared = ["--model-path", str(model), "--skip-tokenizer-init"]
        shared += ["--enable-metrics", "--incremental-streaming-output"]
        shared += ["--decode-log-interval", "10" if gpu else "1", "--log-level", "warning"]
        if dummy:
            shared += ["--load-format", "dummy"]
        if gpu:
            # SGLang captures prefills of some fifty sizes: minutes and memory of every arm, for a
            # prefill or two in what is measured.
            shared += ["--disable-prefill-cuda-graph"]
        return [sys.executable, "-m", _MODULES[self.kind], *shared, *self.flags]


class Worker:
    """A running worker. pid: of its main process."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])

    def wait_until_healthy(self) -> float:
        """Seconds it took. Raises SystemExit with the end of the log if the worker ends."""
        started = time.monotonic()
        while time.monotonic() < started + _START_SECONDS and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=30):
                return time.monotonic() - started
            time.sleep(0.2)
        raise SystemExit(f"the worker did not start:\n{self.last_lines()}")

    def stop(self) -> None:
        """SIGTERM, after a minute SIGKILL; nothing of its process group is left."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Worker]:
    """`command --port FREE` in `folder`, not healthy yet; it ends with the block.

    With this process, too, if it calls `end_with_parent`.
    """
    port = free_port()
    pipe, told = parent_watch.for_child()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(pipe,),
            env={**os.environ, **told, **(env or {})},
        )
    worker = Worker(f"http://127.0.0.1:{port}", process, log)
    try:
        yield worker
    finally:
        worker.stop()


@contextmanager
def running(
    specs: Sequence[WorkerSpec], model: Path, *, dummy: bool, gpu: bool
) -> Iterator[dict[WorkerSpec, Worker]]:
    """Healthy workers, one per spec, started one after the other; all are stopped at the end."""
    workers: dict[WorkerSpec, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="vase-benchmark-") as folder, ExitStack() as stack:
        describe_checkout(Path(folder))
        paths = [folder, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, paths))
        for index, spec in enumerate(dict.fromkeys(specs)):
            command = spec.command(model, dummy=dummy, gpu=gpu)
            log = Path(folder) / f"worker-{index}.log"
            env = {"PYTHONPATH": path, **dict(spec.env)}
            worker = stack.enter_context(started(command, log, folder=ROOT, env=env))
            seconds = worker.wait_until_healthy()
            workers[spec] = worker
            print(f"{spec.kind} worker up after {seconds:.0f} s", file=sys.stderr, flush=True)
        yield workers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe_checkout(folder: Path) -> None:
    """Write what an installation of this checkout would say of itself, for a path with `folder`.

    SGLang finds the plugin by its entry point, which a checkout alone does not have.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{entry} = {place}" for entry, place in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
