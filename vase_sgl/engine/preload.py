"""Imported by the fork server, and by nobody else: everything that its children need."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vase_sgl.engine import fork_server
from vase_sgl.engine.importing import without_collector
from vase_sgl.engine.torchvision_cpu import declare_torchvision_operators

fork_server.stand_for_parent()  # before the imports: the main process may end while they run
with without_collector():
    declare_torchvision_operators()
    from sglang.srt.managers import detokenizer_manager, scheduler  # noqa: F401
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils.common import set_ulimit
    from sglang.srt.utils.hf_transformers import tokenizer

    load_plugins()
    set_ulimit()
    if Path(os.environ[fork_server.MODEL_PATH]).is_dir():
        # With the arguments that the children will use, unless the command line has others. If it
        # fails, so it will for them, and they say so.
        with contextlib.suppress(Exception):
            tokenizer.get_tokenizer(
                os.environ[fork_server.MODEL_PATH],
                tokenizer_mode="auto",
                trust_remote_code=False,
                revision=None,
                tokenizer_backend="huggingface",
            )
