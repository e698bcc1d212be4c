"""The numbers that the paper prints (tables/README.md), and which of them are shown beside the losses of a run."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from mom_tokenizers.errors import UserError

FOLDER = Path(__file__).parent / "tables"
TABLES = {2: "Chameleon + Speech", 3: "ablation, Chameleon + Speech, 443M", 4: "Transfusion", 7: "Chameleon"}


@dataclass(frozen=True)
class Published:
    """One printed row: losses in nats per token (squared error for the pictures of Transfusion), gain and FLOPs in
    percent."""

    table: int
    row: str
    """The model's size; of Table 3 the decoupled projections, such as in_proj+dt_proj."""
    modality: str
    metric: str
    """`training`, or a validation set's name."""
    dense_loss: float
    mixture_loss: float
    gain_percent: float
    relative_flops_percent: float | None = None
    transformer_loss: float | None = None

    def belongs_to(self, name: str) -> bool:
        """Whether this row is shown beside the loss called `name`. Training figures belong to training losses. Figures
        of a validation set belong to the set of the same name, or to any set where the names have nothing in common."""
        *prefix, _, modality = name.split("/")
        if modality != self.modality or (self.metric == "training") != (not prefix):
            return False
        known = {p.metric.lower() for t in TABLES for p in read(t)}
        return not prefix or prefix[1].lower() == self.metric.lower() or prefix[1].lower() not in known


def read(table: int) -> list[Published]:
    """The rows of a table, in the paper's order. Raises ValueError for a table that is not there."""
    if table not in TABLES:
        raise UserError(f"the paper's tables with gains are {', '.join(map(str, TABLES))}, not {table}")
    with open(FOLDER / f"table{table}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    if table == 3:
        dense = float(lines[0]["loss"])
        return [
            Published(3, x["decoupled"], "total", "training", dense, float(x["loss"]), float(x["gain_percent"]))
            for x in lines
        ]
    return [
        Published(
            table,
            x["scale"],
            x["modality"],
            x["metric"],
            float(x["dense_loss"]),
            float(x["mixture_loss"]),
            float(x["gain_percent"]),
            float(x["relative_flops_percent"]),
            float(x["transformer_loss"]) if "transformer_loss" in x else None,
        )
        for x in lines
    ]


def select(text: str) -> list[Published]:
    """The rows of TABLE:ROW, such as 7:1.5B or 3:in_proj+dt_proj. Raises ValueError that lists what there is."""
    table, separator, row = text.partition(":")
    if not separator or not table.isdigit():
        raise UserError(f"--paper {text}: expected TABLE:ROW, such as 7:1.5B")
    rows = read(int(table))
    found = [p for p in rows if p.row.lower() == row.lower()]
    if not found:
        known = ", ".join(dict.fromkeys(p.row for p in rows))
        raise UserError(f"--paper {text}: Table {table} has no row {row!r}; it has {known}")
    return found
