"""Training with the large products in FP8, emulated on the CPU, beside training in bf16."""

import pytest
import torch

from mom_train.model.language_model import build_model, set_precision
from mom_train.model.routed import Projection, RoutedProjection
from tests.helpers.run_config import tiny_config
from tests.helpers.steps import train_steps

FP8 = {"steps": 8, "batch": 4, "micro_batch": 2, "precision": "fp8", "fp8_emulation": True}


def in_fp8(model):
    named = model.blocks.named_modules()
    return {name.rsplit(".")[-1] for name, m in named if isinstance(m, Projection | RoutedProjection) and m.fp8}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"dim": 32, "layers": 1, "decoupled": []}, {"in_proj", "out_proj"}),
        ({"dim": 32, "layers": 1, "decoupled": ["in_proj"], "router": "learned"}, {"in_proj", "out_proj"}),
        (
            {"architecture": "transformer", "heads": 2, "dim": 32, "layers": 1, "decoupled": ["attention"]},
            {"qkv_proj", "out_proj", "gate_up_proj", "down_proj"},
        ),
    ],
)
def test_the_large_products_are_in_fp8_and_those_that_make_time_steps_are_not(model, parts, tmp_path):
    config = tiny_config(tmp_path, model=model, training=FP8)
    built = build_model(config)
    assert in_fp8(built) == set()
    set_precision(built, config, torch.device("cpu"))
    assert in_fp8(built) == parts
    assert (built.head.fp8 == "emulated") == (config.layout.size % 16 == 0)


def test_losses_stay_beside_those_of_bf16_and_are_not_the_same(tmp_path):
    histories = {}
    for precision in ("bf16", "fp8"):
        training = FP8 | {"precision": precision, "fp8_emulation": precision == "fp8"}
        config = tiny_config(tmp_path, training=training)
        histories[precision] = train_steps(config, 2)["history"]
    for (losses, norms, _), (b_losses, b_norms, _) in zip(histories["fp8"], histories["bf16"], strict=True):
        assert losses != b_losses
        assert losses == pytest.approx(b_losses, rel=2e-2)
        assert norms["total"] == pytest.approx(b_norms["total"], rel=0.2)


def test_a_device_without_fp8_is_refused_unless_emulation_is_asked_for(tmp_path):
    config = tiny_config(tmp_path, training=FP8 | {"fp8_emulation": False})
    with pytest.raises(ValueError, match=r"fp8 does not run here: cpu has no FP8 .*fp8_emulation: true"):
        set_precision(build_model(config), config, torch.device("cpu"))
    set_precision(build_model(config), config, torch.device("cpu"), required=False)


def test_what_fp8_cannot_do_is_refused_by_the_config(tmp_path):
    with pytest.raises(ValueError, match="nothing to emulate"):
        tiny_config(tmp_path, training=FP8 | {"precision": "bf16"})
    with pytest.raises(ValueError, match="multiples of 16, and the model has 40"):
        tiny_config(tmp_path, training=FP8, model={"dim": 40, "layers": 1, "decoupled": []})
