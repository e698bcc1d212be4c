"""How long this process has been running."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_age() -> int:
    """Nanoseconds since this process was started, before Python and its imports, to about 10 ms. 0 where the operating
    system does not say (only Linux does, in /proc)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        return max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, AttributeError):
        return 0
