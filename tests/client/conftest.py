"""The gateway that the gateway's own tests run against."""

from __future__ import annotations

from tests.gateway.conftest import running

__all__ = ["running"]
