"""The command gpu-check: see mom_tools.bench.gpu_check. It also runs from a checkout that was never installed."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / room) for room in ("", "data", "tokenizers", "tools")]

from mom_tools.bench.gpu_check import main

if __name__ == "__main__":
    main()
