"""A line chart as the numbers that an inline SVG needs: tools/mom_tools/compare/report.html draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 36
_SI = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}


@dataclass(frozen=True)
class Series:
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """Number of the run."""
    style: Literal["line", "faint", "dots"]
    label: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """1500 -> 1.5k; 1.4e13 -> 14T; 0.004 -> 0.004."""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    for size, letter in _SI.items():
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def chart(title: str, series: Sequence[Series], x_label: str, from_zero: bool = False) -> dict[str, Any]:
    """Lines, dots and ticks in the coordinates of a WIDTH x HEIGHT picture. The vertical range is that of the values
    after the first twentieth of x, where losses fall from the ceiling, unless `from_zero`."""
    right = max((max(s.x) for s in series if len(s.x)), default=1.0) or 1.0
    late = [y for s in series if s.style != "faint" for x, y in zip(s.x, s.y, strict=True) if x >= 0.05 * right]
    low, high = (min(late), max(late)) if late else (0.0, 1.0)
    low = 0.0 if from_zero else low
    room = 0.05 * (high - low) or 0.1 * (abs(high) or 1.0)
    low, high = (low if from_zero else low - room), high + room

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / right * (WIDTH - _LEFT - _RIGHT)
        up = min(max((y - low) / (high - low), -0.2), 1.2)  # what lies outside is clipped, but must stay drawable
        return round(across, 1), round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1)

    lines, dots = [], []
    for s in series:
        placed = [at(x, y) for x, y in zip(s.x, s.y, strict=True)]
        text = " ".join(f"{x:g},{y:g}" for x, y in placed)
        lines.append({"points": text, "colour": s.colour % 8, "style": s.style, "label": s.label})
        if s.style == "dots":
            for (x, y), raw_x, raw_y in zip(placed, s.x, s.y, strict=True):
                if _TOP <= y <= HEIGHT - _BOTTOM:
                    note = f"{s.label}: {raw_y:.4f} at {short(raw_x)} {x_label}"
                    dots.append({"x": x, "y": y, "colour": s.colour % 8, "note": note})
    return {
        "title": title,
        "x_label": x_label,
        "lines": lines,
        "dots": dots,
        "x_ticks": [(at(v, low)[0], short(v)) for v in ticks(0, right)],
        "y_ticks": [(at(0, v)[1], short(v)) for v in ticks(low, high)],
        "frame": {"left": _LEFT, "top": _TOP, "width": WIDTH - _LEFT - _RIGHT, "height": HEIGHT - _TOP - _BOTTOM},
        "size": (WIDTH, HEIGHT),
    }
