"""The program of the demo as it is, but for where its commands run: each in a process forked from one that has imported
torch. With FORKED_RANKS in the environment, so do the ranks of its runs, without `mom local`."""

import os
import subprocess
import sys
from types import SimpleNamespace

from mom_tools.demo import demo
from tests.helpers.ranks import mom_train_ranks, program


def _run(command, env, stdout):
    assert command[:3] == [sys.executable, "-m", "mom_tools"]
    name, *arguments = command[3:]
    if name == "local" and "FORKED_RANKS" in os.environ:
        assert arguments[:2] == ["--nproc-per-node", "2"]
        ended = mom_train_ranks(2, None, *arguments[2:], timeout=900)
        return subprocess.CompletedProcess(command, max(abs(code) for code, _ in ended))
    done = program("mom_tools.__main__", name, *arguments, cwd=os.getcwd())
    sys.stderr.write(done.stderr)
    if stdout != subprocess.DEVNULL:
        print(done.stdout, end="", flush=True)
    return done


def main():
    demo.subprocess = SimpleNamespace(run=_run, DEVNULL=subprocess.DEVNULL)
    demo.main()
