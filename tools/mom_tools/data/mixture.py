"""Token shards as the weighted sources of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def sources(dataset: Path, lanes: int, shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """The shards as sources of a run, weighted so that the tokens of the modalities come out as `shares`, as nearly as
    the mixtures in the shards allow.

    The shares are scaled to the modalities that exist, and a modality without a share counts like the smallest one.
    Shards are grouped by the modality of which they have most, compared with the whole. Within a group they are
    weighted by size. Shards with too few documents for the lanes are left out, unless that leaves none.
    """
    stored = json.loads((dataset / "manifest.json").read_text())["shards"]
    shards = [s for s in stored if s["documents"] >= lanes and sum(s["tokens"].values())]
    if not shards:
        return [{"path": str(dataset)}]
    modalities = list(dict.fromkeys(m for s in shards for m, tokens in s["tokens"].items() if tokens))
    tokens_SM = np.array([[s["tokens"].get(m, 0) for m in modalities] for s in shards], dtype=np.float64)
    size_S = tokens_SM.sum(1)
    group_S = (tokens_SM / size_S[:, None] / tokens_SM.sum(0)).argmax(1)
    groups = np.unique(group_S)
    in_group_GS = group_S == groups[:, None]
    mixture_GM = in_group_GS @ tokens_SM
    mixture_GM /= mixture_GM.sum(1, keepdims=True)
    wanted_M = np.array([shares.get(m, min(shares.values())) for m in modalities])
    weight_G = np.linalg.lstsq(mixture_GM.T, wanted_M / wanted_M.sum(), rcond=None)[0].clip(min=0.01)
    weight_S = (weight_G[:, None] * in_group_GS * size_S / (in_group_GS * size_S).sum(1, keepdims=True)).sum(0)
    return [
        {"path": str(dataset), "shards": s["name"], "weight": round(float(w), 8)}
        for s, w in zip(shards, weight_S / weight_S.sum(), strict=True)
    ]
