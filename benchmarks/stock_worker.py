"""Stock SGLang on the machine at hand: `python -m benchmarks.stock_worker [any SGLang flag]`.

Takes the same flags as `vase-sgl worker`, and on a CPU the same defaults. There SGLang needs our
platform class to run at all (device name and attention backend); none of vase_sgl's hooks is
loaded, which is checked.
"""

from __future__ import annotations

from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

# A spawned child imports this module first, as `__mp_main__`.
declare_torchvision_operators()

import os  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402

from vase_sgl.engine.server import complete_argv, written_out  # noqa: E402
from vase_sgl.parent_watch import end_with_parent  # noqa: E402


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    os.environ["SGLANG_PLUGINS"] = "vase_sgl_cpu"  # the platform alone; inherited by the children
    end_with_parent()
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    if HookRegistry._patched:
        raise SystemExit(f"not stock SGLang: hooks on {sorted(HookRegistry._patched)}")
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        cpu = not torch.accelerator.is_available()
        run_server(prepare_server_args(complete_argv(written_out(argv), cpu=cpu)))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
