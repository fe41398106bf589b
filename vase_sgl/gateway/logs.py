"""Logs, as text or as one JSON object a line. They never hold keys, seeds, prompts or output."""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

from vase_sgl.gateway import telemetry

_fields: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "vase_log", default=MappingProxyType({})
)

#: Libraries whose logs quote what passes through them, or are noise below warnings.
_TALKATIVE = ("aiosqlite", "sqlalchemy", "aiohttp", "asyncio", "grpc", "redis", "asyncpg")


@contextmanager
def fields(**values: str) -> Iterator[None]:
    """Add these fields to every JSON line of the body."""
    token = _fields.set({**_fields.get(), **values})
    try:
        yield
    finally:
        _fields.reset(token)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; tenant, request_id, trace_id where there is one; error."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields.get(),
            **getattr(record, "vase", {}),
        }
        trace_id = telemetry.trace_id()
        if trace_id is not None:
            line["trace_id"] = trace_id
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """One line for a message, whatever a worker or a client had put into it; a stack follows."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _time(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _time(record: logging.LogRecord) -> str:
    """In UTC, as records are dated."""
    time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return time.isoformat(timespec="milliseconds")


def http_server_logger() -> logging.Logger:
    """A logger for aiohttp's servers. Of an error it keeps the type: the text quotes the bytes that
    were no HTTP, which may be a key or a prompt."""
    logger = logging.getLogger("vase_sgl.gateway.http")
    logger.addFilter(_without_text)
    return logger


def _without_text(record: logging.LogRecord) -> bool:
    if record.exc_info and record.exc_info[0] is not None:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[0].__name__}", ()
    record.exc_info = record.exc_text = None
    return True


def set_up(level: str, format: Literal["text", "json"]) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
