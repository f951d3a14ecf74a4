"""Where results come from: the commit of the code that made them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Short name of the checked-out commit; None outside a git checkout or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
