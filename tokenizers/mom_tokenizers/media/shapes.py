"""The shapes that pictures may have: grids of rows x columns tokens that all have about the same number of tokens.

    for n = 1 .. N:   n x floor(N / n) and floor(N / n) x n,   if one side is at most max_aspect_ratio times the other

N is the number of tokens of a square picture. A grid r x c has more than N - max(r, c) tokens and at most N. With each
grid there is the same one turned, so that a picture and the same picture turned are treated alike. A picture goes to
the grid whose aspect ratio is nearest by |log(width / height) - log(c / r)|; it is resized until it covers the grid,
and what stands out is cut off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mom_tokenizers.errors import UserError

Grid = tuple[int, int]
"""(rows, columns) of a picture, in tokens."""
WIDEST = 16.0
"""The largest max_aspect_ratio."""
MOST_TOKENS = 1 << 16
"""The most tokens of a picture, 256 x 256 of them. A table for more would have over a thousand shapes."""
_KEYS = ("tokens", "max_aspect_ratio")
_GRID = re.compile(r"(\d+)x(\d+)")
_RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Shapes:
    """The table of grids. Raises UserError where `tokens` is no square number, or the ratio is not possible."""

    tokens: int
    """The number of tokens of a square picture, which no other grid exceeds."""
    max_aspect_ratio: float = 4.0
    """How many times as long the longer side of a grid may be, in tokens."""

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or self.tokens < 1 or math.isqrt(self.tokens) ** 2 != self.tokens:
            raise UserError(
                f"shapes: tokens must be the number of tokens of a square picture, such as 64 or 256, "
                f"not {self.tokens!r}"
            )
        if self.tokens > MOST_TOKENS:
            raise UserError(f"shapes: tokens is {self.tokens:,}, more than the {MOST_TOKENS:,} that a picture may have")
        ratio = self.max_aspect_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 < ratio <= WIDEST:
            raise UserError(
                f"shapes: max_aspect_ratio must be above 1 and at most {WIDEST:g}, such as 4, not {ratio!r}"
            )
        object.__setattr__(self, "max_aspect_ratio", float(ratio))

    @classmethod
    def of(cls, values: Any) -> Shapes:
        """The shapes that {"tokens", "max_aspect_ratio"} stand for. Raises UserError for anything else."""
        if not isinstance(values, Mapping) or "tokens" not in values or set(values) - set(_KEYS):
            raise UserError(f"shapes: expected {{tokens: 64, max_aspect_ratio: 4}}, got {values!r}")
        return cls(**values)

    def as_json(self) -> dict[str, int | float]:
        """The same values as a mapping, which `of` reads."""
        return {"tokens": self.tokens, "max_aspect_ratio": self.max_aspect_ratio}

    @property
    def square(self) -> Grid:
        """The grid of a square picture."""
        side = math.isqrt(self.tokens)
        return side, side

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """All grids, in the order of their rows."""
        # A side n of a grid is at most ratio * floor(N / n), and so at most the root of ratio * N.
        longest = min(self.tokens, math.isqrt(math.ceil(self.max_aspect_ratio * self.tokens)))
        sides = [(n, self.tokens // n) for n in range(1, longest + 1)]
        every = {*sides, *((columns, rows) for rows, columns in sides)}
        return tuple(sorted((r, c) for r, c in every if max(r, c) <= self.max_aspect_ratio * min(r, c)))

    def nearest(self, width: float, height: float) -> Grid:
        """The grid for a picture of this width and height. Of two that are equally near, the one with more tokens."""
        wanted = math.log(width / height)
        return min(self.grids, key=lambda g: (abs(wanted - math.log(g[1] / g[0])), -g[0] * g[1], g))

    def asked_for(self, shape: str) -> Grid:
        """The grid that a person names: "4x16" is 4 rows of 16 columns and must be one of the grids; "2:1" is a width
        and a height, and gives the nearest grid. Raises UserError for anything else."""
        check_written(shape)
        if match := _GRID.fullmatch(shape):
            grid = int(match[1]), int(match[2])
            if grid not in self.grids:
                raise UserError(f"shape {shape}: {grid[0]} rows of {grid[1]} columns is none of the shapes: {self}")
            return grid
        width, height = (float(side) for side in shape.split(":"))
        if not max(width / height, height / width) <= self.max_aspect_ratio:  # numbers too large for float give NaN
            raise UserError(f"shape {shape}: no side may be more than {self.max_aspect_ratio:g} times the other")
        return self.nearest(width, height)

    def __str__(self) -> str:
        return ", ".join(f"{rows}x{columns}" for rows, columns in self.grids)


def check_written(shape: str) -> None:
    """Raises UserError for a shape that is written neither as width:height nor as ROWSxCOLUMNS."""
    ratio = _RATIO.fullmatch(shape)
    if not _GRID.fullmatch(shape) and (ratio is None or not float(ratio[1]) or not float(ratio[2])):
        raise UserError(f"shape {shape!r}: write width:height, such as 2:1, or ROWSxCOLUMNS, such as 4x16")


def cropped_share(width: float, height: float, grid: Grid) -> float:
    """The share of a picture's area that is cut off when it is resized to cover a grid: 1 - min(a / b, b / a), with the
    aspect ratios a of the picture and b of the grid."""
    ratio = (width / height) / (grid[1] / grid[0])
    return 1 - min(ratio, 1 / ratio)
