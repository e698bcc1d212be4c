"""The fastest that cards can multiply matrices, by the data sheets of their makers."""

from __future__ import annotations

import re

BF16_PEAK = {
    "A100": 312e12,
    "A6000": 154.85e12,
    "L40S": 362e12,
    "H100 SXM": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "GB300": 2500e12,
    "MI300X": 1300e12,
    "MI325X": 1300e12,
    "MI355X": 2500e12,
}
"""Dense bf16 FLOPs per second of a card (not the figures with sparsity, which are twice as high)."""

_NAMES = {
    "A100": r"\bA100\b",
    "A6000": r"\bRTX A6000\b",
    "L40S": r"\bL40S\b",
    "H100 SXM": r"\bH100 (80GB HBM3|SXM\w*)\b",
    "H100 NVL": r"\bH100 NVL\b",
    "H100 PCIe": r"\bH100 PCIe\b",
    "H200": r"\bH200\b(?! NVL)",
    "H20": r"\bH20\b",
    **{name: rf"\b{name}\b" for name in ("B200", "B300", "GB200", "GB300", "MI300X", "MI325X", "MI355X")},
}


def bf16_peak(device_name: str) -> float | None:
    """Dense bf16 FLOPs per second of the card with this name, as `torch.cuda.get_device_name` gives it, such as
    "NVIDIA H100 80GB HBM3". None for an unknown card and for a part of a card (MIG)."""
    if re.search(r"\bMIG\b", device_name):
        return None
    found = [card for card, pattern in _NAMES.items() if re.search(pattern, device_name)]
    return BF16_PEAK[found[0]] if len(found) == 1 else None
