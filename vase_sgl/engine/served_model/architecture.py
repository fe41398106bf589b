"""What SGLang looks for in a model package: `EntryClass`, here that of its own file."""

from __future__ import annotations

import importlib
import os

from vase_sgl.engine.served_model import MODEL_FILE

EntryClass = importlib.import_module(f"sglang.srt.models.{os.environ[MODEL_FILE]}").EntryClass
