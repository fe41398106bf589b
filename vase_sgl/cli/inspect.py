"""`vase-sgl inspect`: a page of what a request kept, from the file its worker wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vase_sgl.cli.failures import reported


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: vase-sgl inspect 4be0b0b1e4c54a7c8d9e0f1a2b3c4d5e --dir kept "
        "--tokenizer models/Qwen3-8B -o page.html"
    )(inspect)


def inspect(
    request_id: Annotated[str, typer.Argument(help="The id of a request run with `inspect`.")],
    folder: Annotated[
        Path, typer.Option("--dir", help="The worker's --vase-inspect-dir, or a copy of it.")
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="The model's folder, or its tokenizer.json.", show_default="ids are shown"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", show_default="REQUEST_ID.html")
    ] = None,
) -> None:
    """Make one HTML file that shows which tokens every layer and KV head kept, round by round.

    It needs no network. It holds the text of prompt and answer.
    """
    from vase_sgl.inspection import InspectionError, load_request
    from vase_sgl.inspection.page import build_page

    path = output or Path(f"{request_id}.html")
    with reported(InspectionError, OSError):
        inspection = load_request(folder, request_id)
        texts = None
        if tokenizer is not None:
            from vase_sgl.inspection.tokens import load_tokenizer, token_texts

            texts = token_texts(load_tokenizer(tokenizer), inspection.token_ids.tolist())
        path.write_text(build_page(inspection, texts), encoding="utf-8")
    unknown = 0 if texts is None else texts.count(None)
    if unknown:
        typer.echo(
            f"warning: {tokenizer} has no text for {unknown} of the tokens, and their ids are "
            "shown; if it is of another model, name that of the one that ran the request",
            err=True,
        )
    if inspection.missing_heads:
        missing = ", ".join(map(str, inspection.missing_heads))
        typer.echo(f"warning: the files of KV heads {missing} are not in {folder}", err=True)
    if inspection.recorded_rounds < inspection.rounds:
        typer.echo(
            f"warning: only the first {inspection.recorded_rounds} of {inspection.rounds} rounds "
            "were recorded",
            err=True,
        )
    typer.echo(f"{path}: {inspection.rounds} rounds, {len(inspection.token_ids)} tokens")
