"""What every benchmark of a worker takes on its command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import on_gpu
from benchmarks.model_configs import SHAPES, Shape, shape_of, write_config
from benchmarks.results import FOLDER, Report, new_report, write
from benchmarks.workers import WorkerSpec


@dataclasses.dataclass(frozen=True)
class Model:
    """path: folder with a config.json. dummy: weights are random."""

    path: Path
    dummy: bool
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.path.name}, random weights" if self.dummy else self.path.name


def parser(doc: str, *, name: str) -> argparse.ArgumentParser:
    """The common options; `name` is the stem of the result files."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = made.add_mutually_exclusive_group()
    models.add_argument(
        "--model", type=Path, help="folder of a model (default on a CPU: the demo's)"
    )
    models.add_argument(
        "--model-config",
        choices=SHAPES,
        help="a model of this shape with random weights (default on a GPU: qwen3-14b)",
    )
    made.add_argument(
        "--worker-arg", action="append", default=[], help="further SGLang flag: --worker-arg=X"
    )
    made.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    made.add_argument("--name", default=name, help="stem of the result files")
    made.add_argument(
        "--dry-run", action="store_true", help="write configurations and commands, measure nothing"
    )
    made.add_argument(
        "--gpu",
        action="store_true",
        default=on_gpu(),
        help="defaults and command lines for a GPU; only with --dry-run where there is none",
    )
    return made


def check(options: argparse.Namespace) -> None:
    """Raise SystemExit where the options ask for what is not there."""
    if options.gpu and not options.dry_run and not on_gpu():
        raise SystemExit("--gpu needs a GPU that torch can use; there is none (--dry-run works)")


def the_model(options: argparse.Namespace, folder: Path) -> Model:
    """The model asked for; a configuration is written below `folder`."""
    name = options.model_config
    if options.model is None and name is None:
        if not options.gpu:
            from vase_sgl.demo.model import ensure_model

            return _local(ensure_model())
        name = "qwen3-14b"
    if name is not None:
        return Model(write_config(name, folder), True, SHAPES[name])
    return _local(options.model)


def _local(path: Path) -> Model:
    if not (path / "config.json").exists():
        raise SystemExit(f"no model at {path}: the folder must hold a config.json")
    shape = shape_of(json.loads((path / "config.json").read_text()))
    dummy = not any(path.glob("*.safetensors"))
    return Model(path, dummy, shape)


def settings(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What a report keeps of the options."""
    left_out = ("output", "name", "dry_run", "model", "model_config")
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    return {"model": model.name, "kv_bytes_per_slot": model.shape.kv_bytes_per_token} | kept


def dry_run(
    benchmark: str,
    options: argparse.Namespace,
    model: Model,
    specs: dict[str, WorkerSpec],
    markdown: Callable[[Report], str],
) -> int:
    """Print and record every worker's command line. Returns the exit status."""
    report = new_report(benchmark, settings(options, model), dry_run=True)
    report["commands"] = {
        arm: spec.command(Path(model.path.name), dummy=model.dummy, gpu=options.gpu)[1:]
        for arm, spec in specs.items()
    }
    for arm, command in report["commands"].items():
        print(f"{arm}: python {' '.join(command)}", file=sys.stderr)
    write(report, options.output, options.name, markdown=markdown)
    return 0
