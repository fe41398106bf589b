"""`--help` of every command shows its texts whole."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from vase_sgl.cli import PASS_THROUGH, build_app

APP = build_app()


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below `command`, itself included, with the words that lead there."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = {
    path: command for path, command in commands(get_command(APP)) if path[:1] != ("worker",)
}


def shown(*path: str) -> str:
    """What the terminal shows, on lines that are long enough."""
    result = CliRunner().invoke(APP, [*path, "--help"], env={"COLUMNS": "2000"})
    assert result.exit_code == 0, result.output
    return words(result.stdout)


def words(text: str) -> str:
    """`text` without colours, frames and line breaks."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", inspect.cleandoc(text)).replace("│", " ")
    return " ".join(plain.split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_text_is_taken_for_markup(path: tuple[str, ...]) -> None:
    """Rich takes [words in brackets] for a style and drops them."""
    command, text = COMMANDS[path], shown(*path)
    texts = [command.help, command.epilog]
    for parameter in command.params:
        texts.append(getattr(parameter, "help", None))
        default = getattr(parameter, "show_default", None)
        texts.append(f"[default: ({default})]" if isinstance(default, str) else None)
    for expected in filter(None, texts):
        assert words(expected) in text


def test_commands_that_parse_their_own_arguments_are_listed() -> None:
    text = shown()
    for name, (_, _, expected) in PASS_THROUGH.items():
        assert f"{name} {expected}" in text


def test_words_in_brackets_would_be_missed() -> None:
    """The test above sees what it is for."""
    app = typer.Typer()

    @app.command()
    def command(count: int = typer.Option(2, help="How many. [default: any]")) -> None:
        pass

    text = words(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "2000"}).stdout)
    assert "How many." in text and "How many. [default: any]" not in text


def test_defaults_that_are_decided_later_are_shown() -> None:
    assert "repeatable. [default: (generate, replay)]" in shown("tenants", "add")
    assert "the share of the records to replay. [default: (100%)]" in shown("replay")
    assert "New file to write. [default: (stdout)]" in shown("audit", "export")
    assert "[default: (REQUEST_ID.html)]" in shown("inspect")
