"""What stops a load test before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class BadSetup(Exception):
    """An option, a file or the gateway is not fit for the test. The text says what to do."""


def explained(error: ValidationError, options: bool = False) -> str:
    """All problems in one line, values left out: they may be keys. Places as `--options`, or as
    keys of a file."""
    return "; ".join(
        _place(problem["loc"], options)
        + (
            "unknown key"
            if problem["type"] == "extra_forbidden"
            else problem["msg"].removeprefix("Value error, ")
        )
        for problem in error.errors(include_input=False, include_url=False)
    )


def _place(location: tuple[int | str, ...], option: bool) -> str:
    name = ".".join(str(part) for part in location)
    if option:
        name = "--" + name.replace("_", "-") if name else ""
    return f"{name}: " if name else ""


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises `BadSetup`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadSetup(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadSetup(f"{what} {path} is not UTF-8 text") from error


def read_yaml(path: Path, what: str, model: type[M]) -> M:
    """A YAML file as a model. Raises `BadSetup`; unknown keys are errors."""
    try:
        content = yaml.safe_load(read_text(path, what))
        return model.model_validate({} if content is None else content)
    except yaml.YAMLError as error:
        raise BadSetup(f"{what} {path} is not YAML: {error}") from error
    except ValidationError as error:
        raise BadSetup(f"{what} {path}: {explained(error)}") from error
