import subprocess
import sys
from pathlib import Path

from torchrun_launch.local import rank_environment

CHECKOUT = Path(__file__).parents[2]


def test_ranks_share_the_cores_and_the_users_settings_stay():
    assert rank_environment(2, 8, {})["OMP_NUM_THREADS"] == "4"
    assert rank_environment(4, 2, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_environment(2, 8, {"OMP_NUM_THREADS": "3"})


def test_every_command_answers_help():
    tools = sorted(str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "tools").glob("*.py"))
    commands = [
        ["-m", "torchrun_launch"],
        ["-m", "torchrun_launch", "local"],
        ["-m", "mom_train"],
        *([t] for t in tools),
    ]
    for command in commands:
        done = subprocess.run([sys.executable, *command, "--help"], cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout
