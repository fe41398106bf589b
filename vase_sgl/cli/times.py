"""Points in time: shown, and as options: dates, or ages such as 90d."""

from __future__ import annotations

import datetime
import re

import typer

_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def shown(moment: datetime.datetime) -> str:
    """To the second, in UTC, as an option takes it."""
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str, option: str) -> datetime.datetime:
    """An ISO 8601 date or time, UTC unless it has an offset. Raises `typer.BadParameter`."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a date; one looks like 2026-11-01 or 2026-11-01T08:30+01:00",
            param_hint=option,
        ) from error
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def age(text: str, option: str) -> datetime.timedelta:
    """A length of time such as 90d, 12h or 30m. Raises `typer.BadParameter`."""
    match = re.fullmatch(r"(\d{1,6})([dhm])", text)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not an age; one looks like 90d, 12h or 30m", param_hint=option
        )
    return datetime.timedelta(**{_UNITS[match[2]]: int(match[1])})
