"""What the paper's own losses say about scale: the law of each printed loss over the size, and whether the FLOPs that
the mixture needs for the dense model's loss rise or fall with it."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from mom_tools.compare.published import TABLES, Published, read
from mom_tools.laws.law import LEVEL, fit, interval
from mom_tools.laws.results import shown
from mom_tools.output import markdown_table

_UNITS = {"M": 1e6, "B": 1e9}
SAID = """\
The paper prints one loss for each size, so the law has one term: L(N) = E + A (N / n0)^-alpha. Table 4 has three sizes,
which three constants always fit, and so no law. In Tables 2 and 7 the two largest models were trained for a quarter
fewer steps than the others (120,000 of 160,000), which a law of N alone cannot know: it reads that as a higher E. One
run a size leaves no spread between seeds. The intervals of {level:.0f} % are from the residuals of the fit, and from
the straight line of log(FLOPs to match) over log(N), whose two models had equal steps at every size."""


def size_of(row: str) -> float:
    """The parameters that a name such as 443M or 1.5B says."""
    return float(row[:-1]) * _UNITS[row[-1]]


def trend(rows: list[Published]) -> tuple[float, tuple[float, float]]:
    """(factor by which the mixture's FLOPs to match change when the size grows tenfold, its t interval). Needs three
    sizes."""
    x = np.log10([size_of(p.row) for p in rows])
    y = np.log10([(p.relative_flops_percent or math.nan) / 100 for p in rows])
    line = stats.linregress(x, y)
    half = stats.t.ppf((1 + LEVEL) / 2, len(rows) - 2) * line.stderr
    return float(10**line.slope), (float(10 ** (line.slope - half)), float(10 ** (line.slope + half)))


def report() -> str:
    """The tables of all losses that the paper prints at three sizes or more, as Markdown."""
    laws, trends = [], []
    for table in (2, 4, 7):
        groups: dict[tuple[str, str], list[Published]] = {}
        for one in read(table):
            groups.setdefault((one.modality, one.metric), []).append(one)
        for (modality, metric), rows in groups.items():
            sizes = np.array([size_of(p.row) for p in rows])
            name = [f"{table}", modality, metric]
            for model in ("dense", "mixture") if len(rows) > 3 else ():  # three points fix three constants
                losses = np.array([getattr(p, f"{model}_loss") for p in rows])
                law = fit(sizes, np.ones(len(rows)), losses, list(sizes), 1000)
                values = [shown(float(x[0]), interval(x), 2) for x in (law.E_R, law.A_R, law.alpha_R)]
                laws.append([*name, model, *values, f"{law.residual:.4f}"])
            factor, ends = trend(rows)
            verdict = "grows" if ends[1] < 1 else "shrinks" if ends[0] > 1 else "not decided"
            first, last = (f"{p.relative_flops_percent:.1f} ({p.row})" for p in (rows[0], rows[-1]))
            trends.append([*name, first, last, shown(factor, ends, 3), verdict])
    titles = "; ".join(f"Table {n}: {TABLES[n]}" for n in (2, 4, 7))
    parts = [
        "# The published losses over the size",
        f"{titles}.",
        "## FLOPs to match, in percent of the dense model's, and their change when N grows tenfold",
        markdown_table(["table", "loss", "set", "smallest", "largest", "tenfold N: times", "advantage"], trends, 3),
        "## Laws",
        markdown_table(["table", "loss", "set", "model", "E", "A", "alpha", "residual"], laws, 4),
        SAID.format(level=100 * LEVEL),
    ]
    return "\n\n".join(parts)
