"""What a request kept, round by round: the file a worker writes and the page made of it.

Needs numpy; the page of decoded text needs tokenizers too. Knows nothing of SGLang or gRPC.
"""

from __future__ import annotations

from vase_sgl.inspection.file import (
    Inspection,
    InspectionError,
    file_name,
    is_file_name,
    load_request,
)

__all__ = ["Inspection", "InspectionError", "file_name", "is_file_name", "load_request"]
