"""The gRPC gateway: identity, limits, seeds, audit and replay in front of SGLang workers.

Imports neither torch nor sglang; workers are reached over HTTP.
"""

from __future__ import annotations
