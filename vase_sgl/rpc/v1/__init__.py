"""Generated from proto/vase/v1; do not edit, run proto/generate.sh."""

from __future__ import annotations
