import argparse

import pytest

from mom_tools.bench import step as bench_step
from mom_train.config.model import PROJECTIONS, ModelConfig
from mom_train.cost.flops import parameters, training_flops_per_token

TINY = ["--dim", "32", "--layers", "1", "--vocabulary", "64", "--repetitions", "2", "--device", "cpu"]


def measured(*arguments):
    parser = argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    return bench_step.run(parser.parse_args([*TINY, *arguments]))


@pytest.mark.parametrize("more", [[], ["--precision", "bf16", "--checkpointing", "selective"]])
def test_the_systems_of_one_run_are_compared(more):
    result = measured("--length", "64", "--modalities", "2", *more)
    systems = result["systems"]
    assert list(systems) == ["mixture", "dense", "transformer"]
    for values in systems.values():
        phases = [values[f"{phase}_ms"] for phase in ("forward", "backward", "clip", "optimizer")]
        assert all(phase > 0 for phase in phases)
        assert values["without_optimizer_ms"] < values["step_ms"]
        assert values["over_dense"] > 0
        assert (values["over_dense"] == 1) == (values is systems["dense"])
        assert values["tokens_per_s"] == pytest.approx(1e3 * 2 * 64 / values["step_ms"])
    config = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)
    assert systems["mixture"]["parameters"] == sum(parameters(config, 64, 2).values())
    flops = training_flops_per_token(config, 64) * 2 * 64
    assert systems["mixture"]["gflops_per_s"] == pytest.approx(flops / systems["mixture"]["step_ms"] / 1e6)
    assert result["settings"]["gemm_gflops_per_s"] > 0
    lines = bench_step.markdown(result).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_a_ratio_is_that_of_steps_side_by_side_whatever_the_machines_drift():
    base = [{"forward": 10.0 * slow, "optimizer": 1.0} for slow in (1, 4, 2, 9, 3)]
    own = [{"forward": 1.1 * x["forward"], "optimizer": 5.0} for x in base]
    assert bench_step.paired_ratio(own, base, ("forward",)) == pytest.approx(1.1)
    assert bench_step.paired_ratio(own, base, ("forward", "optimizer")) == pytest.approx((33 + 5) / (30 + 1))


def test_a_rows_memory_grows_with_its_length_and_no_faster():
    """Beyond what does not depend on it: gradients."""
    result = measured("--context", "1k", "2048", "4k", "8k")["context"]
    assert list(result) == ["1024", "2048", "4096", "8192"]
    peaks = [values["peak_bytes"] for values in result.values()]
    first, second, third = (peaks[i + 1] - peaks[i] for i in range(3))
    assert second == pytest.approx(2 * first, rel=0.05)
    assert third == pytest.approx(2 * second, rel=0.05)
    assert "| 4096 " in bench_step.markdown({"context": result})
