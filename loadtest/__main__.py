"""`python -m loadtest`: Locust with this folder's locustfile. Every Locust option works."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    from locust.main import main

    sys.argv[1:1] = ["--locustfile", str(Path(__file__).with_name("locustfile.py"))]
    main()
