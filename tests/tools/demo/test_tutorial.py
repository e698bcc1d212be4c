"""docs/tutorial/first-run.md does what it says: its commands, run as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import CHECKOUT


def test_the_tutorials_commands_run_in_their_order(tmp_path):
    blocks = re.findall(
        r"^```sh\n(.*?)^```$", (CHECKOUT / "docs/tutorial/first-run.md").read_text(), re.DOTALL | re.MULTILINE
    )
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in blocks:
        done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    run = tmp_path / "mine/runs/mixture"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(101))
    for modality in ("text", "image"):
        assert lines[-1][f"val/val/loss/{modality}"] < lines[0][f"val/val/loss/{modality}"]
    assert list((tmp_path / "mine/samples").glob("*.png"))
    assert (tmp_path / "mine/report.html").stat().st_size > 10_000
    assert (tmp_path / "mine/matched.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "mine/runs/cluster").exists()
