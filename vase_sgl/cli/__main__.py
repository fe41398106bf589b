"""`python -m vase_sgl.cli` is `vase-sgl`."""

from __future__ import annotations

from vase_sgl.cli import main

if __name__ == "__main__":
    main()
