"""interpreted/ is collected only where Triton interprets: test_in_interpreter.py starts such processes."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
