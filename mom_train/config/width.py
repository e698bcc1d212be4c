"""Width transfer (muP): how initial values and learning rates change with the width of a model.

The updates of all the inputs of a matrix add up, so a learning rate that is best for a narrow model is too large for a
wide one. With `model.base_dim`, the parameters of a model of width `dim` are treated so that a rate that was tuned at
the width `base_dim` is meant to fit here too. Where the two widths are equal, nothing changes.

One rule decides for every matrix: the spectral condition of arXiv 2310.17813, which is the muP of arXiv 2203.03466
(Table 3) in other words. The spectral norm of a matrix and that of its update shall grow as sqrt(m / n), where n is the
growth of its columns (fan-in) from `base_dim` to `dim`, and m that of its rows (fan-out). It follows that

- an update of AdamW, whose entries are all as large as the rate, needs a rate that falls as 1 / n;
- an update of Muon, whose singular values are all equal, needs a rate that goes as sqrt(m / n);
- initial values, drawn independently, have a standard deviation that falls as 1 / sqrt(n) where the rows grow too (a
  "hidden" matrix), and as 1 / n where they do not (an "output" matrix, such as the head).

What is looked up or applied channel by channel has no fan-in that grows: the embedding, the convolution, A_log, D, the
bias of the time step, other biases and norms. These keep their initial values and rates.

A parameter stacks the matrices of all modalities and of several linear maps. Growth is that of each map by itself and
of one modality. No factor stands in the forward pass but that of attention scores, so that exported weights need none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mom_train.config.model import ModelConfig


@dataclass(frozen=True)
class Growth:
    """What becomes of one parameter between the widths `base_dim` and `dim`. Every factor is 1 where they are equal."""

    columns: float = 1.0
    """Columns of its matrices at `dim`, divided by those at `base_dim`."""
    rows: tuple[float, ...] = (1.0,)
    """The same for the rows of each of the linear maps that it stacks, in order."""
    width: float = 1.0
    """dim / base_dim."""
    drawn_by_columns: bool = True
    """Whether initial values fall as 1 / sqrt(columns) without `base_dim` as well. Those of routers do not."""

    @property
    def scales(self) -> tuple[float, ...]:
        """For each linear map, the factor on the initial values that the parameter has without `base_dim`."""
        drawn = 1.0 if self.drawn_by_columns else self.columns**-0.5
        return tuple(drawn * (self.columns**-0.5 if rows == 1 else 1.0) for rows in self.rows)

    @property
    def rate(self) -> float:
        """The factor on AdamW's learning rate. The weight decay is divided by it, because AdamW multiplies the two."""
        return 1 / self.columns

    @property
    def eps(self) -> float:
        """The factor on AdamW's epsilon, which is added to the root of mean squares of gradients. Gradients fall as
        1 / dim, except those of output matrices."""
        output = self.columns != 1 and all(rows == 1 for rows in self.rows)
        return 1.0 if output else 1 / self.width

    @property
    def muon(self) -> tuple[float, ...]:
        """For each linear map, the factor on Muon's learning rate. It takes the place of the growth that
        `optimizer.muon.adjust` has by itself."""
        return tuple(math.sqrt(rows / self.columns) for rows in self.rows)


def growth(name: str, model: ModelConfig) -> Growth:
    """The growth of the parameter of this name in a model of this config."""
    base = model.base
    *_, module, leaf = ["", *name.split(".")]
    maps, at_base, width = _maps(model), _maps(base), model.dim / base.dim
    if module not in maps or leaf not in ("weight", "router"):
        return Growth(width=width)
    columns = maps[module][0] / at_base[module][0]
    if leaf == "router":
        return Growth(columns, width=width, drawn_by_columns=False)
    rows = tuple(here / there for here, there in zip(maps[module][1], at_base[module][1], strict=True))
    return Growth(columns, rows, width)


def _maps(model: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """As `ModelConfig.matrices`, with the other linear maps. A number of rows that no width changes stands as 1."""
    d = model.dim
    return {**model.matrices, "head": (d, (1,)), "patch_out": (d, (1,)), "time_out": (d, (d,))}


def attention_scale(model: ModelConfig) -> float | None:
    """The factor on the products of queries and keys, or None for the usual 1 / sqrt(width of a head).

    With `base_dim`, it is sqrt(base) / width, where `base` is the width of a head at `base_dim`, because queries and
    keys that have learned something are no longer independent, so that their product grows as the width (arXiv
    2203.03466, Definition 4.1).
    """
    base = model.base
    if model.heads is None or base.heads is None:
        return None
    width, at_base = model.dim // model.heads, base.dim // base.heads
    return None if width == at_base else math.sqrt(at_base) / width


def factors(model: ModelConfig, latents: bool) -> dict[str, Growth]:
    """The growth of each kind of parameter, by a name for readers. `latents` says whether pictures are latent
    patches."""
    channels = "A_log, D, dt_bias, convolution, norms" if model.architecture == "mamba" else "norms"
    kinds = {f"embedding, {channels}": "embedding.weight"}
    kinds |= {name: f"{name}.weight" for name in model.matrices}
    kinds |= {f"router of {name}": f"{name}.router" for name in model.routed}
    kinds["head"] = "head.weight"
    if latents:
        kinds |= {
            "patch_in, time_in": "patch_in.weight",
            "time_out": "time_out.weight",
            "patch_out": "patch_out.weight",
        }
    return {kind: growth(name, model) for kind, name in kinds.items()}
