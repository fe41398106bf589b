"""Failed integrity checks, in a file that outlives the worker which they end.

A worker that broke its bookkeeping ends itself within a second, before anything scrapes its
metrics. The next one starts its counter with the lines that the file has.
"""

from __future__ import annotations

import datetime
import logging

from sglang.srt.runtime_context import get_parallel

from vase_sgl.engine.config import engine_config

logger = logging.getLogger(__name__)


class IntegrityError(RuntimeError):
    """A budget invariant does not hold. The server must not go on."""


def integrity_error(text: str) -> IntegrityError:
    """The error to raise. Mutates `VASE_INTEGRITY_LOG`, if there is one: a line with the text."""
    path = engine_config().integrity_log
    if path is not None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        one_line = " ".join(text.split())
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(f"{now} {_rank()} tp_rank={get_parallel().tp_rank} {one_line}\n")
        except OSError:
            logger.exception("VASE_INTEGRITY_LOG could not be written")
    return IntegrityError(text)


def logged_errors() -> int:
    """Errors of this data-parallel rank that the file has."""
    path = engine_config().integrity_log
    if path is None or not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(line.split(" ")[1:2] == [_rank()] for line in lines)


def _rank() -> str:
    return f"dp_rank={get_parallel().dp_rank or 0}"
