"""What the fork server of `fork_server_process` imports: no SGLang."""

from __future__ import annotations

from vase_sgl.engine import fork_server

fork_server.stand_for_parent()
