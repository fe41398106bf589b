"""The plugin fails loudly: signatures, missing hooks, flags, models."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

from tests.engine.scheduler_harness import SteppedScheduler
from vase_sgl.engine import limits, plugin
from vase_sgl.engine.prometheus import EngineMetrics


@pytest.mark.parametrize(
    "hook", plugin.active_hooks() + plugin.FORK_HOOKS, ids=lambda hook: hook.target
)
def test_upstream_signatures_are_the_ones_we_rely_on(hook: plugin.Hook) -> None:
    """The canary: fails with a clear text when SGLang moves."""
    plugin.check_signature(hook)


def test_a_changed_signature_is_named() -> None:
    hook = dataclasses.replace(plugin.HOOKS[0], parameters=("self", "old"))
    with pytest.raises(RuntimeError, match=r"_create_generation_req now takes .*expected .*old"):
        plugin.check_signature(hook)


def test_a_hook_that_sglang_did_not_apply_is_named(
    stepped: SteppedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.verify_applied()
    lost = plugin.HOOKS[3].path
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {lost})
    with pytest.raises(RuntimeError, match=lost):
        plugin.verify_applied()


def test_another_sglang_version_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SGLANG_VERSION", "9.9.9")
    with pytest.raises(SystemExit, match=r"written for sglang 9\.9\.9, found 0\.5\.23"):
        plugin.register()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"enable_mixed_chunk": True}, "leave out --enable-mixed-chunk"),
    ({"speculative_algorithm": "EAGLE"}, "leave out --speculative-algorithm"),
    ({"enable_lora": True}, "leave out --enable-lora"),
    ({"pp_size": 2}, "use --pp-size 1"),
    ({"disaggregation_mode": "decode"}, "leave out --disaggregation-mode"),
    ({"enable_hierarchical_cache": True}, "leave out --enable-hierarchical-cache"),
]


@pytest.mark.parametrize(("flags", "cure"), REFUSED, ids=[next(iter(f)) for f, _ in REFUSED])
def test_unsupported_flags_are_refused_by_name(
    tiny_model: Path, flags: dict[str, Any], cure: str
) -> None:
    limits.refuse_unsupported_flags(ServerArgs(model_path=str(tiny_model)))
    with pytest.raises(limits.UnsupportedConfiguration, match=cure):
        limits.refuse_unsupported_flags(ServerArgs(model_path=str(tiny_model), **flags))


def test_the_scheduler_itself_refuses(stepped: SteppedScheduler, tiny_model: Path) -> None:
    """Also without our command line: the hook runs before anything of the scheduler is built."""
    with pytest.raises(limits.UnsupportedConfiguration, match="leave out --enable-mixed-chunk"):
        Scheduler(ServerArgs(model_path=str(tiny_model), enable_mixed_chunk=True), None)


def test_a_foreign_kv_pool_is_refused(stepped: SteppedScheduler) -> None:
    class LatentPool:
        pass

    class Runner:
        token_to_kv_pool = LatentPool()
        token_to_kv_pool_allocator = stepped.scheduler.token_to_kv_pool_allocator

    with pytest.raises(limits.UnsupportedConfiguration, match="KV pool is LatentPool"):
        limits.refuse_unsupported_pool(Runner())


def test_sglang_itself_is_unmodified() -> None:
    """Every installed SGLang file that the wheel lists with a hash still has that hash."""
    script = (
        "import base64, hashlib, importlib.metadata as m\n"
        "files = [f for f in m.files('sglang') if f.hash and f.suffix == '.py']\n"
        "bad = [str(f) for f in files if base64.urlsafe_b64encode(hashlib.new(f.hash.mode, "
        "f.read_binary()).digest()).rstrip(b'=').decode() != f.hash.value]\n"
        "print(len(files), bad)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    count, changed = output.stdout.split(maxsplit=1)
    assert int(count) > 1000
    assert changed.strip() == "[]"


def test_the_table_of_refused_flags_is_complete() -> None:
    """docs/engine.md lists exactly what `limits` refuses."""
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    section = text.split("## Refused at start-up")[1].split("##")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(listed) == sorted(limits._REQUIRED)


def test_the_documented_metrics_are_the_ones_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    listed = {name.removesuffix("_total") for name in re.findall(r"`(vase:\w+)`", text)}
    registry = CollectorRegistry()
    EngineMetrics({"model_name": "m", "dp_rank": "0"}, registry)
    assert listed == {family.name for family in registry.collect()}
