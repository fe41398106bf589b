"""The worker: SGLang's own HTTP server with the plugin. `python -m vase_sgl.engine.server`.

Start-up is mostly imports, so they are few and side by side: on a CPU SGLang's child processes are
forked from one that imports while this one does (`fork_server`), and only the file of the model
that is served is imported (`served_model`). A child that is spawned all the same first imports
this module again (as `__mp_main__`), so the torchvision workaround reaches it before SGLang does.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from pathlib import Path

from vase_sgl.engine import fork_server, served_model
from vase_sgl.engine.config import (
    DEFAULT_PARAMS,
    INSPECT_DIR,
    MAX_BUDGET,
    MAX_REQUESTS,
    MAX_WINDOW,
    WORKER_TOKEN,
    EngineConfig,
)
from vase_sgl.engine.device import has_accelerator, is_plain_cpu
from vase_sgl.engine.importing import without_collector
from vase_sgl.eviction import EvictionLimits
from vase_sgl.parent_watch import end_with_parent
from vase_sgl.worker_key import WORKER_KEY, HiddenKey, check_key

if __name__ == "__mp_main__":
    from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

    declare_torchvision_operators()

DEFAULT_PORT = 30000
#: SGLang's names of one flag.
_MODEL_FLAGS = ("--model-path", "--model")

#: Defaults on a machine without an accelerator. Any of them may be given explicitly instead.
_CPU_DEFAULTS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--max-running-requests": "32",
    "--mem-fraction-static": "0.3",
    "--max-total-tokens": "32768",
    "--chunked-prefill-size": "2048",
}
#: SGLang's switch that makes logits finite: over others a CPU's sampler raises an error, which ends
#: the worker. Finite ones keep their bits.
SANITIZE_LOGITS = "SGLANG_SANITIZE_NAN_LOGITS"
#: torch's switch against compiling. SGLang has the repetition penalty compiled when it is first
#: asked for: in the scheduler, which stands still for it, and ends where there is no C++ compiler.
NO_COMPILER = "TORCHDYNAMO_DISABLE"
#: MKL's switch for the same float32 products with any number of threads. Without it some CPUs'
#: round a row by its place, and are then given fewer rows at a time (`linear_cpu`).
REPRODUCIBLE_MKL = "MKL_CBWR"
#: The second: an idle scheduler would spin on a core that others need.
_CPU_SWITCHES = ("--disable-cuda-graph", "--sleep-on-idle")


class WorkerError(Exception):
    """The worker cannot start. The text says what to do."""


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    try:
        options, sglang_argv = _parse(written_out(sys.argv[1:] if argv is None else argv))
        _export_settings(options)
        check_one_key(sglang_argv, os.environ.get(WORKER_KEY))
        model_path = check_model(value_of(sglang_argv, *_MODEL_FLAGS))
        check_port(
            value_of(sglang_argv, "--host") or "127.0.0.1",
            int(value_of(sglang_argv, "--port") or DEFAULT_PORT),
        )
        end_with_parent()
        os.environ[WORKER_TOKEN] = secrets.token_hex(8)
        if is_plain_cpu():
            os.environ.setdefault(SANITIZE_LOGITS, "1")
            os.environ.setdefault(REPRODUCIBLE_MKL, "AUTO,STRICT")
            if "--enable-torch-compile" not in sglang_argv:
                os.environ.setdefault(NO_COMPILER, "1")
            os.environ.update(served_model.environment_for(model_path))
            fork_server.start(model_path)
        return _serve(complete_argv(sglang_argv, cpu=not has_accelerator()))
    except (WorkerError, ValueError) as error:
        print(f"vase-sgl worker: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="vase-sgl worker",
        description="SGLang's HTTP server with a fixed KV budget per request. Takes what "
        "`sglang serve` does beside the flags below: the model as first argument, `--config FILE` "
        "and every flag, but for --model-type.",
        epilog="Without an accelerator, unless given otherwise: "
        + " ".join([*_CPU_SWITCHES, *(f"{flag} {value}" for flag, value in _CPU_DEFAULTS.items())])
        + ". Example: vase-sgl worker --model-path Qwen/Qwen3-8B --port 30000",
        allow_abbrev=False,
    )
    limits = EvictionLimits()
    parser.add_argument(
        "--vase-max-budget",
        type=int,
        metavar="N",
        help=f"largest budget a request may ask for (default {limits.max_budget})",
    )
    parser.add_argument(
        "--vase-max-window",
        type=int,
        metavar="N",
        help=f"largest window; sizes the query ring (default {limits.max_window})",
    )
    parser.add_argument(
        "--vase-max-requests",
        type=int,
        metavar="N",
        help="requests at once whose policy scores by attention; each has a query ring (default: "
        "--max-running-requests, or what fits the pool)",
    )
    parser.add_argument(
        "--vase-default",
        metavar="JSON",
        help='eviction parameters of requests that bring none, e.g. {"budget": 2048}',
    )
    parser.add_argument(
        "--vase-inspect-dir",
        metavar="DIR",
        help="where requests with `inspect` leave a file of what they kept, for `vase-sgl "
        "inspect`; it holds their token ids (default: such requests are refused)",
    )
    return parser.parse_known_args(argv)


def _export_settings(options: argparse.Namespace) -> None:
    values = {
        MAX_BUDGET: options.vase_max_budget,
        MAX_WINDOW: options.vase_max_window,
        MAX_REQUESTS: options.vase_max_requests,
        DEFAULT_PARAMS: options.vase_default,
        INSPECT_DIR: options.vase_inspect_dir,
    }
    os.environ.update({name: str(value) for name, value in values.items() if value is not None})
    EngineConfig.from_env()


def written_out(argv: list[str]) -> list[str]:
    """The arguments with flags in place of what says them otherwise.

    That is a model as first argument, and `--config FILE`, whose flags SGLang puts before all
    others. SGLang is imported for it. Raises `WorkerError`, ValueError for a wrong file.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--model-path", *argv]
    if any(token.startswith("--config=") for token in argv):
        raise WorkerError("SGLang passes over --config=FILE; write --config FILE")
    if "--config" not in argv:
        return argv
    with without_collector():
        import yaml

        from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

        declare_torchvision_operators()
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    try:
        merged: list[str] = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    except (OSError, yaml.YAMLError) as error:
        raise WorkerError(f"--config: {error}") from error
    except AttributeError as error:  # of names that are numbers or the like
        raise WorkerError("--config: the names of flags must be text") from error
    return merged


def complete_argv(argv: list[str], *, cpu: bool) -> list[str]:
    """SGLang's arguments, `written_out`, behind our defaults: what is given later holds."""
    if not cpu:
        return list(argv)
    defaults = [token for default in _CPU_DEFAULTS.items() for token in default]
    return [*_CPU_SWITCHES, *defaults, *argv]


def value_of(argv: list[str], *flags: str) -> str | None:
    """The last value of `--flag value` or `--flag=value`; several flags are names of one."""
    found = None
    for index, token in enumerate(argv):
        name, equals, value = token.partition("=")
        if name in flags and equals:
            found = value
        elif name in flags and index + 1 < len(argv):
            found = argv[index + 1]
    return found


def check_model(path: str | None) -> str:
    """The path. Raises `WorkerError` for a missing model before seconds are spent on imports."""
    if path is None:
        raise WorkerError("--model-path is missing: a local folder or a Hugging Face name")
    looks_local = path.startswith(("/", ".", "~")) or Path(path).exists()
    if looks_local and not (Path(path).expanduser() / "config.json").exists():
        raise WorkerError(f"no model at {path}: the folder must hold a config.json")
    return path


def check_one_key(argv: list[str], key: str | None) -> None:
    """Raise `WorkerError` for a wrong key in the environment, or one beside SGLang's flag."""
    if key is None:
        return
    try:
        check_key(key)
    except ValueError as error:
        raise WorkerError(f"{WORKER_KEY} {error}") from error
    if value_of(argv, "--api-key") is not None:
        raise WorkerError(f"both --api-key and {WORKER_KEY} are set; leave one out")


def check_port(host: str, port: int) -> None:
    """Raise `WorkerError` if the port is taken, before the model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise WorkerError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from error


def _serve(argv: list[str]) -> int:
    with without_collector():
        from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

        declare_torchvision_operators()
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.launch_server import run_server
        from sglang.srt.entrypoints import http_server  # noqa: F401  # `run_server` would, later
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

        from vase_sgl.engine import limits, plugin

    plugin.verify_applied()
    server_args = prepare_server_args(argv)
    if key := os.environ.get(WORKER_KEY):
        server_args.api_key = HiddenKey(key)
    try:
        limits.refuse_unsupported_flags(server_args)
    except limits.UnsupportedConfiguration as error:
        raise WorkerError(str(error)) from error
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
