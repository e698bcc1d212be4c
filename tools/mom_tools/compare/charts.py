"""Line charts for an HTML page: matplotlib draws them, and the page's own style sheet colours them.

A colour of the drawing is written into the SVG as a CSS variable, so that a chart follows the reader's choice of a
light or a dark page. Nothing in a chart refers to another file, and the same values give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

INKS = {
    "ink": ("#1b1f24", "#e6e9ed"),
    "quiet": ("#57606a", "#9aa4b0"),
    "line": ("#d8dee4", "#3a424c"),
    "faint": ("#eaeef2", "#2a3038"),
}
"""Name of a CSS variable -> its colour on a light page and on a dark one: text, labels, frames and grids."""
COLOURS = (
    ("#1f77b4", "#6cb6ff"), ("#e07b00", "#ffa657"), ("#2ca02c", "#7ee787"), ("#9467bd", "#d2a8ff"),
    ("#8c564b", "#d9a38f"), ("#d6409f", "#ff9bce"), ("#5f6b7a", "#b0bac5"), ("#17a2b8", "#6fd6e6"),
)  # fmt: skip
"""Colours of the runs, on a light page and on a dark one. The CSS variables are c0, c1 and so on."""
PALETTE = INKS | {f"c{k}": pair for k, pair in enumerate(COLOURS)}

_SIZE = (4.2, 2.5)  # inches of 72 units
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.family": "DejaVu Sans",  # only to measure; the page names its own
    "font.size": 8,
    "text.color": INKS["quiet"][0],
    "axes.edgecolor": INKS["line"][0],
    "axes.labelcolor": INKS["quiet"][0],
    "xtick.color": INKS["quiet"][0],
    "ytick.color": INKS["quiet"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INKS["faint"][0],
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Series:
    """The points of one line."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int
    """Number of the run."""
    style: Literal["line", "faint", "dots"]
    label: str
    """What the browser shows where the pointer rests on the line. For a dot its values follow."""


def short(value: float, _position: float = 0) -> str:
    """A number as the axes show it: 1500 is 1.5k, 1.4e13 is 14T, 0.004 is 0.004."""
    return EngFormatter(sep="")(value) if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def chart(title: str, series: Sequence[Series], x_label: str, from_zero: bool = False) -> str:
    """An `<svg>` element to be put into an HTML page.

    The vertical axis shows the values after the first twentieth of x, because losses fall steeply before; with
    `from_zero` it begins at 0.
    """
    label = f"{title} over {x_label}"
    style: Any = _STYLE | {"svg.hashsalt": label}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_axes((0.12, 0.17, 0.86, 0.8))
        _set_limits(axes, series, from_zero)
        axes.set_xlabel(x_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(short)
        titles = {f"series-{number}": _draw(axes, one, f"series-{number}") for number, one in enumerate(series)}
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(out.getvalue(), label, titles)


def _set_limits(axes: Axes, series: Sequence[Series], from_zero: bool) -> None:
    right = max((max(one.x) for one in series if len(one.x)), default=1.0) or 1.0
    late = [y for one in series if one.style != "faint" for x, y in zip(one.x, one.y, strict=True) if x >= 0.05 * right]
    late = [y for y in late if math.isfinite(y)]
    low, high = (min(late), max(late)) if late else (0.0, 1.0)
    low = 0.0 if from_zero else low
    room = 0.05 * (high - low) or 0.1 * (abs(high) or 1.0)
    axes.set(xlim=(0, right), ylim=(low if from_zero else low - room, high + room))


def _draw(axes: Axes, one: Series, name: str) -> list[str]:
    """Draw a series as an SVG group called `name`. Returns what the browser is to show for each mark in the group."""
    colour = COLOURS[one.colour % len(COLOURS)][0]
    if one.style != "dots":
        width, alpha = (0.6, 0.35) if one.style == "faint" else (1.2, 1.0)
        axes.plot(one.x, one.y, color=colour, linewidth=width, alpha=alpha, gid=name)
        return [one.label]
    axes.plot(one.x, one.y, color=colour, linewidth=0.8, linestyle="--")
    low, high = axes.get_ylim()
    seen = [(x, y) for x, y in zip(one.x, one.y, strict=True) if low <= y <= high]  # others have no mark in the SVG
    axes.scatter([x for x, _ in seen], [y for _, y in seen], color=colour, s=14, linewidths=0, zorder=3, gid=name)
    return [f"{one.label}: {y:.4f} at {short(x)} {axes.get_xlabel()}" for x, y in seen]


def _inline(svg: str, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The `<svg>` element of matplotlib's file, with CSS variables for colours. `titles` has, for the name of a group,
    the text of each of its marks."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for element in list(root.iter()):
        for child in element.findall(f"{{{_SVG}}}style"):
            element.remove(child)  # its rules would hold for the whole page
        if element.tag == f"{{{_SVG}}}g":
            name = element.attrib.pop("id", "")  # names such as axes_1 are the same in every chart
            for mark, text in zip(_marks(element) if name in titles else (), titles.get(name, ()), strict=False):
                if text:
                    ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = text
        if "d" in element.attrib:
            element.set("d", re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", element.attrib["d"]))
    for name in ("width", "height"):
        root.attrib.pop(name)
    root.attrib |= {"role": "img", "aria-label": label}
    text = ElementTree.tostring(root, encoding="unicode")
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    return text


def _marks(group: ElementTree.Element) -> list[ElementTree.Element]:
    """What a group draws, in the order of its points: one path for a line, one element for each dot."""
    defined = {path for definitions in group.iter(f"{{{_SVG}}}defs") for path in definitions}
    kinds = (f"{{{_SVG}}}use", f"{{{_SVG}}}path")
    return [element for element in group.iter() if element.tag in kinds and element not in defined]
