"""`vase-sgl generate`: stream one answer."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from vase_sgl.cli.connection import (
    DEFAULT_TARGET,
    ApiKey,
    AsJson,
    CaFile,
    ClientCert,
    ClientKey,
    Target,
    TlsFlag,
    connect,
    encryption,
)
from vase_sgl.cli.failures import reported
from vase_sgl.eviction.policies import POLICIES

_Float = Annotated[float | None, typer.Option(show_default=False)]


def _policy_help() -> str:
    """Every policy's name and the first line of its documentation."""
    lines = (
        f"{name}: {(policy.__doc__ or '').splitlines()[0]}" for name, policy in POLICIES.items()
    )
    return "\n\n".join(("What goes and what stays.", *lines))


def register(app: typer.Typer) -> None:
    app.command(
        epilog='Example: vase-sgl generate "Tell me a story." --budget 128 --window 32 '
        "--max-new-tokens 512"
    )(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens")] = 256,
    budget: Annotated[
        int | None, typer.Option(help="KV entries to keep per layer and KV head.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Recent tokens never evicted; less than the budget.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help=_policy_help(), show_default=False),
    ] = None,
    prompt_mode: Annotated[
        Literal["evict", "keep"] | None,
        typer.Option(
            help="evict: the budget covers prompt and output. keep: the prompt stays, the budget "
            "covers generated tokens.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer.", min=0)
    ] = None,
    sample_index: Annotated[int, typer.Option(help="Another sample of the same seed.")] = 0,
    inspect: Annotated[
        bool,
        typer.Option("--inspect", help="Have the worker write what was kept: vase-sgl inspect."),
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: _Float = None,
    top_k: Annotated[int | None, typer.Option(show_default=False)] = None,
    min_p: _Float = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer; repeatable.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on to --max-new-tokens.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat/--plain", help="Render the prompt as a user's chat message.")
    ] = True,
    timeout: Annotated[float | None, typer.Option(help="Seconds for all of it.")] = None,
    as_json: AsJson = False,
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: TlsFlag = False,
    ca_file: CaFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
) -> None:
    """Stream one answer, with the state of its KV cache beside it."""
    from rich.console import Console

    from vase_sgl.cli.jsonout import print_json
    from vase_sgl.cli.stream_view import StreamView
    from vase_sgl.client import Completion, Message, Prompt, VaseError

    text = sys.stdin.read() if prompt == "-" else prompt
    messages: Prompt = [Message(role="user", content=text)] if chat and text else text
    encrypted = encryption(tls, ca_file, client_cert, client_key)
    with reported(VaseError), connect(target, api_key, encrypted) as client:
        stream = client.generate(
            messages,
            max_new_tokens=max_new_tokens,
            timeout=timeout,
            budget=budget,
            window=window,
            policy=policy,
            prompt_mode=prompt_mode,
            seed=seed,
            sample_index=sample_index,
            inspect=inspect,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=stop or [],
            ignore_eos=ignore_eos,
        )
        try:
            with stream:
                if as_json:
                    chunks = list(stream)
                    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
                    answer = "".join(chunk.text for chunk in chunks)
                    print_json(Completion(stream.request_id, answer, tokens, stream.result))
                    return
                request_id = stream.request_id  # an error shows before the view opens
                with StreamView(Console()) as view:
                    for chunk in stream:
                        view.add(chunk)
        except KeyboardInterrupt:
            typer.echo("cancelled", err=True)
            raise typer.Exit(130) from None
    result = stream.result
    cache = result.cache
    slots = f"{cache.reserved_slots} slots reserved, " if cache else ""
    rounds = f"{cache.rounds} rounds, " if cache else ""
    typer.echo(
        f"{result.usage.completion_tokens} tokens in {result.timings.total_seconds:.1f} s, "
        f"{rounds}{slots}full KV: {result.full_kv_slots}\n"
        f"replay it with: vase-sgl replay {request_id}",
        err=True,
    )
    if inspect:
        typer.echo(
            f"what it kept, on the worker's machine: vase-sgl inspect {request_id} --dir DIR",
            err=True,
        )
