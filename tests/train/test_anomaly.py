import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from mom_train.anomaly import Judge
from mom_train.config.run import AnomalyConfig


def judged(config, values, judge=None):
    judge = judge or Judge(config, torch.device("cpu"))
    return [bool(judge.bad(torch.tensor(loss), torch.tensor(norm))) for loss, norm in values]


def expected(config, values):
    """The same rule, computed with a list."""
    good, bad = [], []
    for pair in values:
        wrong = not all(map(math.isfinite, pair))
        if len(good) >= 16 and not wrong:
            limits = (config.loss_spike, config.grad_norm_spike)
            for column, (value, limit) in enumerate(zip(pair, limits, strict=True)):
                past = sorted(g[column] for g in good[-config.window :])
                wrong |= limit is not None and value > limit * past[(len(past) - 1) // 2]
        bad.append(wrong)
        if not wrong:
            good.append(pair)
    return bad


@pytest.mark.parametrize("limits", [(None, None), (1.5, None), (None, 3.0), (1.5, 3.0)])
def test_steps_are_judged_by_the_median_of_the_last_good_ones(limits):
    config = AnomalyConfig(loss_spike=limits[0], grad_norm_spike=limits[1], window=20)
    rng = np.random.default_rng(0)
    values = [(float(a), float(b)) for a, b in np.exp(rng.normal(0, (0.3, 0.7), (200, 2)))]
    for i, odd in ((3, math.nan), (50, math.inf), (90, 1e4), (91, 1e4), (150, -math.inf)):
        values[i] = (odd, values[i][1]) if i % 2 else (values[i][0], odd)
    wanted = expected(config, values)
    assert judged(config, values) == wanted
    assert wanted[3]
    assert wanted[50]
    # a checkpoint in between changes nothing
    first = Judge(config, torch.device("cpu"))
    judged(config, values[:77], first)
    second = Judge(config, torch.device("cpu"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert judged(config, values[77:], second) == wanted[77:]
    whole = Judge(config, torch.device("cpu"))
    judged(config, values, whole)
    assert second.state_dict() == whole.state_dict()


def test_a_skipped_update_leaves_weights_moments_and_step_counts_as_they_were():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def state():
        values = [p.detach().clone() for p in layer.parameters()]
        return values + [v.clone() for s in optimizer.state.values() for v in s.values()]

    for bad in (False, True, False):
        layer(torch.ones(2, 4)).sum().backward()
        before = state()
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        after = state()
        assert bad == (len(before) == len(after) and all(map(torch.equal, before, after)))
