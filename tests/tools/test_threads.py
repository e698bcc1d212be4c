"""Every program decides how waiting threads behave before it imports torch, because OpenMP reads that only once."""

import json
import os
import subprocess
import sys

from tests.helpers import CHECKOUT

FORKS = """
import json, os, runpy, sys
import jinja2, matplotlib, numpy, pydantic, safetensors.numpy, tqdm, yaml  # once, for all that follow

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, (json.dumps([sys.argv[0], os.environ.get("OMP_WAIT_POLICY")]) + "\\n").encode())
            os._exit(0)

for program in sys.argv[1:]:
    if os.fork() == 0:
        sys.meta_path.insert(0, Torch())
        sys.argv[:] = [program]
        runpy.run_path(program, run_name="imported")
        os.write(1, (json.dumps([program, "never"]) + "\\n").encode())
        os._exit(0)
    os.wait()
"""


def test_threads_that_wait_leave_the_cores_to_others_in_every_program():
    programs = [str(p) for p in [*sorted((CHECKOUT / "tools").glob("*.py")), CHECKOUT / "mom_train/__main__.py"]]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", FORKS, *programs], env=environment, capture_output=True, text=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == set(programs), done.stderr
    assert "passive" in found.values(), "no program imports torch: the test sees nothing"
    assert {program: policy for program, policy in found.items() if policy not in ("passive", "never")} == {}
