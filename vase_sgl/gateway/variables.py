"""Environment variables of the configuration, and mistakes in them that would go unnoticed."""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

#: What Kubernetes sets for a Service, such as VASE_HTTP_PORT for one that is called `vase-http`.
_SERVICE = re.compile(r"(tcp|udp|sctp)://")


class Environment(EnvSettingsSource):
    """pydantic's own, but that a key of an open mapping has the type that it would have in JSON."""

    def explode_env_vars(
        self, field_name: str, field: FieldInfo, env_vars: Mapping[str, str | None]
    ) -> dict[str, Any]:
        found = super().explode_env_vars(field_name, field, env_vars)
        if _kind(field) is not dict:
            return found
        return {key: _json_or_text(value) for key, value in found.items()}


def check_variables(model: type[BaseModel], prefix: str, delimiter: str) -> None:
    """Refuse variables that mean a key of `model` but would not set it. Raises `ValueError`.

    Names that no key has are left alone: they belong to others.
    """
    known = dict(_variables(model, prefix, delimiter))
    for given, value in os.environ.items():
        name = given.upper()
        if not _flat(name).startswith(_flat(prefix)):
            continue
        if name in known:
            _check_json(given, value, known[name])
            continue
        right = _right_name(name, known, delimiter)
        if right not in (None, name) and not _SERVICE.match(value):
            raise ValueError(f"{given} sets nothing; the name of that variable is {right}")


def _right_name(name: str, known: Mapping[str, FieldInfo], delimiter: str) -> str | None:
    """The variable that differs from `name` in underscores only."""
    flat = _flat(name)
    for right, field in known.items():
        if flat == _flat(right):
            return right
        inside = right + delimiter
        if _kind(field) is dict and flat.startswith(_flat(inside)):
            return inside + flat[len(_flat(inside)) :]
    return None


def _variables(
    model: type[BaseModel], start: str, delimiter: str
) -> Iterator[tuple[str, FieldInfo]]:
    for key, field in model.model_fields.items():
        name = start + key.upper()
        yield name, field
        kind = _kind(field)
        if issubclass(kind, BaseModel):
            yield from _variables(kind, name + delimiter, delimiter)


def _kind(field: FieldInfo) -> type:
    """The model or container that the field takes, with None or without; `object` if neither."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        kind = typing.get_origin(candidate) or candidate
        if isinstance(kind, type) and issubclass(kind, (BaseModel, dict, tuple)):
            return kind
    return object


def _check_json(name: str, value: str, field: FieldInfo) -> None:
    kind = _kind(field)
    if kind is object:
        return
    try:
        json.loads(value)
    except ValueError as error:
        example = '["one", "two"]' if kind is tuple else '{"key": "value"}'
        what = "a list" if kind is tuple else "a mapping"
        raise ValueError(f"{name} is not JSON; {what} looks like {example}") from error


def _json_or_text(value: Any) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _flat(name: str) -> str:
    return re.sub("_+", "_", name)
