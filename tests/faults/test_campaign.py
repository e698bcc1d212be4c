"""A short campaign of faults, which takes a few minutes on two cores."""

import json
import math
import os
import signal

import pytest

from tests.faults.campaign import main
from tests.faults.experiment import Saved, Violation, check_rows, check_saved


@pytest.fixture
def campaign(capsys):
    """A function that runs the campaign here, not in a process of its own, which would import torch again. Returns the
    kinds of the faults and what it said."""
    before = signal.getsignal(signal.SIGTERM)

    def run(folder, *kinds, seed=0, steps=80, minutes=60):
        line = ["--seed", seed, "--steps", steps, "--faults", len(kinds), "--kinds", *kinds, "--minutes", minutes]
        code = main([*map(str, line), "--output", str(folder), "--json", str(folder / "out.json")])
        said = capsys.readouterr()
        assert code == 0, said.out + said.err
        return [fault["kind"] for fault in json.loads((folder / "out.json").read_text())["faults"]], said.err

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_run_ends_as_if_undisturbed_whatever_is_killed_signalled_or_damaged(campaign, tmp_path):
    kinds = ["kill-rank", "kill-agent", "sigusr1-launcher", "pause", "flipped-byte", "latest-removed"]
    disk = ["full-disk", "read-only-disk"]
    short = {"steps": 40}  # several runs for these faults, each with the three intervals that falling back needs
    assert campaign(tmp_path, *kinds, *disk, minutes=0, **short)[0] == []  # out of time: the same command goes on
    made = (tmp_path / "reference/run/metrics.jsonl").stat().st_mtime
    injected, said = campaign(tmp_path, *kinds, *disk, **short)
    assert (tmp_path / "reference/run/metrics.jsonl").stat().st_mtime == made
    assert set(kinds) <= set(injected)
    assert "nan-in-data" in injected
    if not set(disk) <= set(injected):
        assert "NOT TESTED: full-disk" in said
        pytest.skip(f"all but a full and a read-only disk, which are NOT tested: {said.splitlines()[0]}")


def test_the_campaign_tells_a_repeated_a_lost_and_a_changed_step_and_a_damaged_file(tmp_path):
    rows = [{"step": s, "loss/total": s / 7, "val/held/loss/total": 1.0} for s in range(6)]
    check_rows(rows, rows, last=5)
    changed = [{**row, "loss/total": math.nextafter(row["loss/total"], 9)} for row in rows]
    for spoiled in (rows[:3] + rows[2:], rows[:2] + rows[3:], changed):
        with pytest.raises(Violation, match="step"):
            check_rows(spoiled, rows)
    with pytest.raises(Violation, match="ends at step 4"):
        check_rows(rows[:5], rows, last=5)
    folder = tmp_path / "checkpoints/step-3"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"abc")
    (folder / "checksums.json").write_text(json.dumps({"__0_0.distcp": {"size": 3, "crc32": 1}}))
    with pytest.raises(Violation, match=r"__0_0.distcp'\] not as written"):
        check_saved(Saved(tmp_path), Saved(tmp_path), [3], tmp_path)


@pytest.mark.cluster
def test_a_run_survives_its_object_store_its_hosts_and_ranks_that_hang(campaign, tmp_path):
    kinds = ["hang", "kill-launcher", "store-stalls", "store-503", "cable-out", "host-cut-off", "host-dies"]
    injected, said = campaign(tmp_path, *kinds)
    if missing := set(kinds) - set(injected):
        message = f"{sorted(missing)} are NOT tested: {said.splitlines()[0]}"
        if os.environ.get("MOM_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"MOM_REQUIRE_CLUSTER=1, but {message}")
        pytest.skip(message)
