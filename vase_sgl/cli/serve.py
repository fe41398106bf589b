"""`vase-sgl serve`: the gateway, with an embedded worker or remote ones."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vase_sgl.cli.failures import reported
from vase_sgl.parent_watch import end_with_parent

if TYPE_CHECKING:
    from vase_sgl.gateway.config import GatewayConfig
    from vase_sgl.gateway.server import Gateway


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: vase-sgl serve --model-path Qwen/Qwen3-8B -- --mem-fraction-static 0.8"
    )(serve)


def serve(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file; VASE_* variables and the options here override it."),
    ] = None,
    model_path: Annotated[
        str | None, typer.Option(help="Model to serve in a child process.")
    ] = None,
    worker_url: Annotated[
        list[str] | None, typer.Option(help="Running worker to use instead; repeatable.")
    ] = None,
    worker_dns: Annotated[
        list[str] | None,
        typer.Option(help="URL whose name stands for one worker per address; repeatable."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any.")] = None,
    http_port: Annotated[
        int | None, typer.Option(help="Open the OpenAI-compatible HTTP door there; 0: any.")
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option(help="Encrypt with the certificate and private key in this PEM file."),
    ] = None,
    tenants_file: Annotated[Path | None, typer.Option(help="Who may call.")] = None,
    audit_url: Annotated[str | None, typer.Option(help="Where to record generations.")] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Count the tenants' usage there, for all gateways.")
    ] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Let everyone in. Only for your own machine.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics for Prometheus there; 0: any.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Send spans and metrics to this OTLP collector (gRPC).")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    worker_args: Annotated[
        list[str] | None,
        typer.Argument(help="After `--`: flags of the embedded worker, SGLang's own among them."),
    ] = None,
) -> None:
    """Serve gRPC until SIGTERM, Ctrl-C or the terminal is gone (SIGHUP), then drain."""
    import uvloop

    from vase_sgl.gateway.audit import AuditError
    from vase_sgl.gateway.config import ConfigError, load_config
    from vase_sgl.gateway.limits.shared import SharedUsageError
    from vase_sgl.gateway.listening import PortInUse
    from vase_sgl.gateway.open_files import raise_limit
    from vase_sgl.gateway.tenants import TenantFileError
    from vase_sgl.gateway.worker_embedded import WorkerStartError

    end_with_parent()
    _set_up_logging(log_level, log_format)
    overrides = _without_none(
        {
            "listen": {"host": host, "port": grpc_port},
            "worker": {
                "model_path": model_path,
                "urls": worker_url or None,
                "dns": worker_dns or None,
                "args": worker_args or None,
            },
            "http": {"port": http_port},
            "tls": {"certificate": tls},
            "telemetry": {"metrics_port": metrics_port, "otlp_endpoint": otlp_endpoint},
            "audit": {"url": audit_url},
            "limits": {"redis_url": redis_url},
            "tenants_file": tenants_file,
            "insecure_no_auth": insecure_no_auth or None,
        }
    )
    with reported(
        ConfigError, TenantFileError, SharedUsageError, AuditError, PortInUse, WorkerStartError
    ):
        settings = load_config(config, overrides)
        raise_limit(settings)
        # Less time from call to first token than asyncio's own loop; the tests run on it too.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings))


async def _serve(config: GatewayConfig) -> None:
    from vase_sgl.gateway.server import Gateway

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        # It comes twice from a shell whose terminal is gone, so a second one hurries nothing.
        loop.add_signal_handler(signal.SIGHUP, stop.set)
    starting = asyncio.create_task(_start(Gateway, config))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    gateway = starting.result()
    # What a start leaves stays for good: a collector that looks at it again and again would hold up
    # every stream for as long.
    gc.collect()
    gc.freeze()
    if gateway.metrics_port is not None:
        typer.echo(f"metrics on http://{config.listen.host}:{gateway.metrics_port}/metrics")
    if gateway.http_port is not None:
        typer.echo(f"OpenAI-compatible HTTP on {config.listen.host}:{gateway.http_port}/v1")
    typer.echo(f"vase-sgl is serving on {config.listen.host}:{gateway.port}")
    await stop.wait()
    with contextlib.suppress(OSError):  # the terminal may be gone
        typer.echo("draining; once more to stop at once", err=True)
    hurried: set[asyncio.Task[None]] = set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurried.add(loop.create_task(gateway.hurry())))
    await gateway.stop()
    await asyncio.gather(*hurried)


async def _start(gateway: type[Gateway], config: GatewayConfig) -> Gateway:
    from rich.console import Console

    console = Console(stderr=True)
    if config.worker.model_path is None:
        return await gateway.start(config, lambda seconds: None)
    loading = f"loading {config.worker.model_path} (log: {config.worker.log_file})"
    if not console.is_terminal:
        typer.echo(loading, err=True)
    with console.status(loading) as status:
        return await gateway.start(
            config, lambda seconds: status.update(f"{loading} {seconds:.0f} s")
        )


def _set_up_logging(level: str, format_: str) -> None:
    from vase_sgl.gateway import logs

    known = ("debug", "info", "warning", "error")
    if level not in known:
        raise typer.BadParameter(f"choose one of {', '.join(known)}", param_hint="--log-level")
    match format_:
        case "text" | "json":
            logs.set_up(level, format_)
        case _:
            raise typer.BadParameter("choose text or json", param_hint="--log-format")


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    """The given values only, so that what is left out is decided elsewhere."""
    pruned = {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }
    return {key: value for key, value in pruned.items() if value != {}}
