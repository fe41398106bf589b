"""Validation errors of files, in words a person can act on."""

from __future__ import annotations

import typing

from pydantic import BaseModel, ValidationError


def describe(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """One line for all problems: where, what, and for an unknown key of `model` what is known.

    Values are left out: they may be secrets.
    """
    return "; ".join(
        _describe(tuple(problem["loc"]), problem["type"], problem["msg"], model)
        for problem in error.errors(include_input=False, include_url=False)
    )


def _describe(
    location: tuple[int | str, ...], kind: str, message: str, model: type[BaseModel] | None
) -> str:
    where = ".".join(str(part) for part in location)
    prefix = f"{where}: " if where else ""
    if kind != "extra_forbidden":
        return prefix + message.removeprefix("Value error, ")
    known = _keys(model, location[:-1]) if model else ()
    return f"{prefix}unknown key" + (f"; known are {', '.join(known)}" if known else "")


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys `model` has at `path`; none if the path leaves nested models."""
    for part in path:
        field = model.model_fields.get(str(part))
        candidates = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return ()
        model = nested[0]
    return tuple(model.model_fields)
