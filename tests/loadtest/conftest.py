"""A running gateway for each test, as the gateway's own tests have it."""

from __future__ import annotations

from tests.gateway.conftest import running

__all__ = ["running"]
