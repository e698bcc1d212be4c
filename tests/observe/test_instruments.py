"""Instruments of a run: what they measure, what they write, and that they change nothing that is computed."""

import gc
import gzip
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mom_tokenizers.errors import UserError
from mom_train.cost.gemm import gemm_flops_per_second
from mom_train.cost.peaks import bf16_peak
from mom_train.observe.garbage import Collections
from mom_train.observe.profiles import Requests
from mom_train.observe.snapshots import MemorySnapshots
from mom_train.observe.speed import Speed
from tests.helpers.ranks import run_ranks
from tests.helpers.run_config import tiny_config, write_config
from tests.helpers.runs import assert_equal_tensors, metrics, run, weights

FIRST = SimpleNamespace(main=True, rank=0, world_size=2, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1300),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_card_has_its_own_peak_and_an_unknown_one_has_none(name, tera):
    assert bf16_peak(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_the_speed_of_a_product_is_two_n_cubed_over_the_best_time_and_draws_no_random_number_of_torch():
    before, times = torch.get_rng_state(), iter([0.001, 0.5, 0.25, 2.0])
    speed = gemm_flops_per_second(torch.device("cpu"), torch.float32, lambda work: (work(), next(times))[1], n=8)
    assert speed == 2 * 8**3 / 0.25  # the first one, which warms up, does not count
    assert torch.equal(torch.get_rng_state(), before)


def test_shares_are_flops_of_a_rank_over_what_it_could_compute(tmp_path):
    speed = Speed(tiny_config(tmp_path), FIRST)
    assert speed.gemm > 0
    assert speed.peak is None
    speed.gemm, speed.peak = 4e9, 8e9
    speed.restart(10 * 10**9)
    assert speed.figures(18 * 10**9, 2.0) == {"perf/mfu": 0.25, "perf/gemm_share": 0.5}  # 8e9 FLOPs, 2 s, 2 ranks
    speed.restart(10 * 10**9)  # a rollback
    assert speed.figures(14 * 10**9, 1.0) == {"perf/mfu": 0.25, "perf/gemm_share": 0.5}


def test_a_request_is_found_once_by_rank_0_and_its_file_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("mom_train.observe.profiles._LOOK_SECONDS", 0.0)
    first, second = Requests(tmp_path, FIRST), Requests(tmp_path, SimpleNamespace(main=False))
    (tmp_path / "profile.request").touch()
    assert second.look("profile", "memory") == {"profile": False, "memory": False}
    assert first.look("profile", "memory") == {"profile": True, "memory": False}
    assert first.look("profile", "memory") == {"profile": False, "memory": False}


class Memory:
    """Stands in for torch.cuda.memory."""

    def __init__(self):
        self.calls = []

    def _record_memory_history(self, **how):
        self.calls.append(how)

    def _snapshot(self):
        return {"segments": [1, 2]}


def test_running_out_of_memory_leaves_a_snapshot_and_other_errors_leave_none(tmp_path):
    memory = Memory()

    def dry_run():
        try:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        except torch.OutOfMemoryError:
            raise UserError("a full batch does not fit") from None

    with pytest.raises(UserError), MemorySnapshots(tmp_path, FIRST, 1000, memory):
        dry_run()
    content = (tmp_path / "memory/out-of-memory-rank-0.pickle").read_bytes()
    assert pickle.loads(content) == {"segments": [1, 2]}
    assert content[:2] == b"\x80\x04"  # pickle's protocol 4
    assert memory.calls == [{"max_entries": 1000, "stacks": "python"}, {"enabled": None}]
    with pytest.raises(ValueError, match="a bug"), MemorySnapshots(tmp_path / "other", FIRST, None, memory):
        raise ValueError("a bug")
    assert not (tmp_path / "other").exists()
    assert len(memory.calls) == 2


def test_garbage_is_collected_at_the_chosen_steps_alone():
    def cycle():
        made = Cycle()
        made.itself = made

    class Cycle:
        alive = 0

        def __init__(self):
            Cycle.alive += 1

        def __del__(self):
            Cycle.alive -= 1

    collections = Collections(3)
    with collections:
        assert not gc.isenabled()
        for step in range(1, 8):
            cycle()
            collections.after(step)
            assert Cycle.alive == step % 3
    assert gc.isenabled()
    gc.collect()
    with Collections(None):
        assert gc.isenabled()


def measured_on(folder):
    """A step of a sharded model on this rank: (its statistics, what they should be made of)."""
    from mom_train.distributed.ranks import process_group
    from mom_train.model.init import initialize
    from mom_train.model.language_model import build_model
    from mom_train.model.sharding import shard
    from mom_train.observe.block_statistics import BlockStatistics
    from mom_train.ops.layout import RowLayout

    config = tiny_config(folder)
    with process_group(60) as ranks:
        torch.manual_seed(ranks.rank)
        model = shard(build_model(config), ranks.mesh)
        model.to_empty(device="cpu")
        initialize(model, 0)
        modality_BL = torch.randint(0, 2, (2, 8)).to(torch.uint8)  # nothing of the third one
        layout = RowLayout.sort(modality_BL, torch.zeros(2, 8, dtype=torch.int32), 3)
        seen = []
        model.blocks[-1].register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))
        statistics = BlockStatistics(model, list(model.blocks), config.layout.modalities)
        tokens_T = torch.randint(0, 100, (16,))
        statistics.begin()
        for _ in range(2):  # two micro-batches
            model(tokens_T, layout, tokens_T)
        with statistics.update(), torch.no_grad():
            model.head.weight.mul_(1.25)
        figures = statistics.figures()
        assert statistics.figures() == {}  # no hooks are left
        return figures, torch.cat(seen).numpy(), modality_BL.flatten().sort().values.repeat(2).numpy()


def test_statistics_are_those_of_the_positions_of_all_ranks(tmp_path):
    tiny_config(tmp_path)
    first, second = run_ranks(2, measured_on, tmp_path)
    figures = first[0]
    assert figures == second[0]
    rows = np.concatenate([first[1], second[1]]).astype(np.float64)
    modality = np.concatenate([first[2], second[2]])
    last = max(int(key.split("/")[2]) for key in figures if key.startswith("stats/rms"))
    for m, name in enumerate(("text", "image")):
        own = rows[modality == m]
        assert figures[f"stats/rms/{last}/{name}"] == pytest.approx(np.sqrt((own**2).mean()), rel=1e-6)
        assert figures[f"stats/max/{last}/{name}"] == np.abs(own).max()
    assert not any(key.endswith("/speech") for key in figures)
    assert figures["stats/update/head"] == pytest.approx(0.25, rel=1e-6)
    assert figures["stats/update/in_proj"] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"observe": {"profile_steps": [4, 3]}}, "comes after the last one"),
        ({"observe": {"profile_steps": [7, 9]}}, "is beyond training.steps"),
        ({"observe": {"statistics_every": 3}, "log_every": 2}, "must be a multiple of log_every"),
        ({"observe": {"statistics_every": 3}, "training__compile": True}, "needs training.compile=false"),
    ],
)
def test_what_cannot_be_observed_is_refused(tmp_path, changes, says):
    with pytest.raises((UserError, ValueError), match=says):
        tiny_config(tmp_path, **changes)


def test_all_instruments_together_leave_the_run_as_it_is(tmp_path):
    config = write_config(tmp_path)
    run(config)
    plain, plain_weights = metrics(tmp_path / "run"), weights(tmp_path / "run")
    assert not (tmp_path / "run/profile").exists()

    seen = tmp_path / "seen"
    seen.mkdir()
    (seen / "profile.request").touch()
    (seen / "memory.request").touch()
    observe = ["statistics_every=4", "profile_steps=[6,7]", "profile_ranks=all", "memory_history=100", "gc_every=2"]
    said = run(config, f"run_dir={seen}", *(f"observe.{key}" for key in observe))
    lines = metrics(seen)
    measured = [line["step"] for line in lines if any(key.startswith("stats/") for key in line)]
    assert measured == [4, 8]
    assert [{k: v for k, v in line.items() if not k.startswith("stats/")} for line in lines] == plain
    assert_equal_tensors(weights(seen), plain_weights)
    assert not list(seen.glob("*.request"))
    assert "a snapshot of the memory needs CUDA" in said
    assert "memory of a rank at its peak: null (only CUDA tells), predicted: 0.0" in said
    lines = [json.loads(line) for line in (seen / "metrics.jsonl").read_text().splitlines()]
    assert all(line["perf/gemm_share"] > 0 for line in lines if "loss/total" in line)

    traces = sorted(str(path.relative_to(seen)) for path in seen.glob("profile/*/*"))
    assert traces == [f"profile/step-{s}/rank-{r}.json.gz" for s in ("2-4", "6-7") for r in (0, 1)]
    for path, steps in (("2-4/rank-0", 3), ("6-7/rank-1", 2)):
        with gzip.open(seen / f"profile/step-{path}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        names = [event.get("name") for event in events]
        assert sum(str(name).startswith("ProfilerStep#") for name in names) == steps
        assert "mom::selective_scan" in names
