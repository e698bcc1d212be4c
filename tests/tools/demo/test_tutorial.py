"""docs/tutorial/first-run.md does what it says: its commands run in their order, with fewer steps."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

FEWER = {  # steps and sequences, so that the test is quick: the page's words -> the test's
    "training: {steps: 100,": "training: {steps: 50,",
    "training.stop_at=50\n": "training.stop_at=25\n",
    "sampling: {every: 100,": "sampling: {every: 50,",
    "checkpoint: {every: 40,": "checkpoint: {every: 20,",
    "validation: {every: 25, sequences: 32}": "validation: {every: 25, sequences: 16}",
    "  steps: 100\n": "  steps: 20\n",
}


def commands(block):
    """The block's commands in their order: (True, the arguments of a command of mom) or (False, other lines)."""
    lines = block.replace("\\\n", " ").splitlines(keepends=True)
    for of_mom, some in itertools.groupby(lines, lambda line: line.startswith("mom ")):
        if of_mom:
            yield from ((True, shlex.split(line, comments=True)[1:]) for line in some)
        else:
            yield False, "".join(some)


def test_the_tutorials_commands_run_in_their_order(tmp_path):
    """Commands of mom run in processes that are forked from one that has imported torch."""
    page = (CHECKOUT / "docs/tutorial/first-run.md").read_text()
    for words, fewer in FEWER.items():
        assert page.count(words) == 1, words
        page = page.replace(words, fewer)
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = set()
    for block in re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        for of_mom, command in commands(block):
            if of_mom:
                ran.add(command[0])
                done = program("mom_tools.__main__", *command, cwd=tmp_path)
            else:
                line = ["bash", "-euc", command]
                done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert ran == set(re.findall(r"^mom (\S+)", page, re.MULTILINE))
    run = tmp_path / "mine/runs/mixture"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(51))
    for modality in ("text", "image"):
        assert lines[-1][f"val/val/loss/{modality}"] < lines[0][f"val/val/loss/{modality}"]
    assert list((tmp_path / "mine/samples").glob("*.png"))
    assert (tmp_path / "mine/report.html").stat().st_size > 10_000
    assert (tmp_path / "mine/matched.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "mine/runs/cluster").exists()
