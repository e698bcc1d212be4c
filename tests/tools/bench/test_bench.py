import importlib.util
import json
import shutil

import pytest

from tests.helpers import CHECKOUT as ROOT
from tests.helpers.ranks import program


def bench(*arguments):
    return program(ROOT / "tools/bench.py", *arguments)


SMALL = ("--length", 104, "--dim", 32, "--batch", 1, "--repetitions", 1, "--device", "cpu")


@pytest.mark.parametrize(
    ("kernel", "dtype", "names"),
    [
        ("scan", "bf16", {"ours, torch"}),
        ("conv", "fp32", {"ours, torch", "F.conv1d (crosses documents)"}),
        ("routing", "bf16", {"all four, ours", "all four, one dense matrix", "all four, boolean masks"}),
        ("block", "fp32", {"ours, torch", "ours, dense", "its four GEMMs alone"}),
    ],
)
def test_each_kernel_is_held_against_float64_and_then_timed(kernel, dtype, names, tmp_path):
    out = tmp_path / "figures.json"
    done = bench(kernel, *SMALL, "--dtype", dtype, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert names <= set(result["figures"])
    assert not result["wrong"]
    if shutil.which("cc") and kernel != "routing":
        assert "ours, c" in result["figures"]
    checked = {n for n, v in result["figures"].items() if v["error"] == v["error"]}
    assert {n for n in result["figures"] if "ours" in n and n not in ("ours, dense", "all four, ours")} <= checked
    for name, values in result["figures"].items():
        assert values["both_ms"] > 0, name
        assert name in done.stdout
    if kernel == "scan" and not importlib.util.find_spec("mambapy"):
        assert "mambapy is NOT INSTALLED" in done.stdout
    if kernel == "block":
        assert "NOT READ: --published" in done.stdout


def test_what_is_wrong_is_not_timed(tmp_path):
    """A kernel with one wrong sign, through the whole tool."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys, runpy\n"
        "from mom_train.ops.conv import torch as conv_torch\n"
        "right = conv_torch.backward\n"
        "conv_torch.backward = lambda *a: tuple(-g for g in right(*a))\n"
        f"sys.argv = ['bench.py', 'conv', *{[*map(str, SMALL)]!r}, '--json', '-']\n"
        f"runpy.run_path({str(ROOT / 'tools/bench.py')!r}, run_name='__main__')\n"
    )
    done = program(broken)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert "ours, torch" in result["wrong"]
    assert "ours, torch" not in result["figures"]


def test_a_step_is_measured_through_the_same_door():
    sizes = ("--dim", 32, "--layers", 1, "--vocabulary", 128, "--length", 64, "--batch", 1, "--repetitions", 1)
    done = bench("step", *sizes, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert {"mixture", "dense"} <= set(json.loads(done.stdout)["systems"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scan", "--length", 50), "--length is over 100"),
        (("block", *SMALL, "--published", "/nowhere"), "takes a clone of"),
    ],
)
def test_a_mistake_is_one_clear_message(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
