"""`mom gpu-check`: every part on the CPU in a tiny size, and what is left when a part or the command ends badly."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mom_tools.bench import gpu_check
from mom_tools.bench.findings import Findings, read_findings, table_of
from mom_tools.bench.gpu_check import NEEDED, PARTS, GpuCheck, Part
from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

HERE = __name__

# ---- parts for the tests below -----------------------------------------------------------------------------


def quick(findings):
    findings.row("Numbers", name="one", value="1")


def hangs(findings):
    findings.row("Numbers", name="before", value="0")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (findings.file.parent.parent / "started").write_text("yes")
    time.sleep(60)


def crashes(findings):
    findings.row("Numbers", name="before", value="0")
    print("the last words")
    os.abort()


def raises(findings):
    raise RuntimeError("out of memory, say")


def finds_an_error(findings):
    findings.wrong("two is not one")


def check(folder, *functions, limit=30.0, total=60.0, correctness=True):
    parts = [Part(f.__name__, f"About {f.__name__}", HERE, limit, correctness) for f in functions]
    return GpuCheck(parts, folder, total, tiny=True)


def written(folder):
    return json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


# ---- ends that are not good --------------------------------------------------------------------------------


def test_a_part_that_hangs_is_killed_with_what_it_started_and_the_next_one_runs(tmp_path):
    assert check(tmp_path, hangs, quick, limit=12).run() == 1
    values, text = written(tmp_path)
    assert values["parts"]["hangs"]["state"].startswith("killed at its limit of")
    assert values["parts"]["hangs"]["tables"] == {"Numbers": [{"name": "before", "value": "0"}]}
    assert values["parts"]["quick"]["state"] == "done"
    assert values["failed"] == ["hangs"]
    assert "killed at its limit" in text
    assert re.search(r'test_gpu_check.py", line \d+ in hangs', text), "the last lines do not say where it hung"
    left = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True).stdout
    assert not [line for line in left.splitlines() if "time.sleep(60)" in line and not line.startswith("Z")]


def test_a_part_that_crashes_or_raises_is_reported_with_its_last_lines_and_the_next_one_runs(tmp_path):
    assert check(tmp_path, crashes, raises, quick).run() == 1
    values, text = written(tmp_path)
    parts = values["parts"]
    assert parts["crashes"]["state"] == "failed: SIGABRT"
    assert parts["crashes"]["tables"]["Numbers"]
    assert "the last words" in text
    assert parts["raises"]["state"] == "failed: exit code 1"
    assert parts["raises"]["last_lines"][-1] == "RuntimeError: out of memory, say"
    assert "RuntimeError: out of memory, say" in text
    assert parts["quick"]["state"] == "done"
    assert values["failed"] == ["crashes", "raises"]


def test_the_exit_code_is_1_for_an_error_in_a_part_about_correctness_and_in_no_other(tmp_path):
    assert check(tmp_path, finds_an_error).run() == 1
    assert "**WRONG**: two is not one" in written(tmp_path)[1]
    assert check(tmp_path, finds_an_error, raises, correctness=False).run() == 0
    assert "two is not one" in written(tmp_path)[1]


def test_what_no_time_is_left_for_is_listed(tmp_path):
    assert check(tmp_path, hangs, quick, total=6.0, limit=2.0).run() == 1
    values, text = written(tmp_path)
    assert values["parts"]["quick"] == {"state": "no time left"}
    assert re.search(r"\| quick .*\| no time left", text)


def test_a_request_to_end_leaves_both_files_whole_for_what_was_done(tmp_path):
    code = f"""
import signal, sys
from mom_tools.bench import gpu_check
from tests.tools.bench.test_gpu_check import check, hangs, quick
signal.signal(signal.SIGTERM, gpu_check._asked_to_end)
from pathlib import Path
sys.exit(check(Path({str(tmp_path)!r}), quick, hangs).run())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    values, text = written(tmp_path)
    assert values["parts"]["quick"]["tables"] == {"Numbers": [{"name": "one", "value": "1"}]}
    assert values["parts"]["hangs"]["state"] == "ended with the command"
    assert values["parts"]["hangs"]["tables"] == {"Numbers": [{"name": "before", "value": "0"}]}
    assert "| before" in text
    assert not list(tmp_path.glob(".*"))


# ---- what parts write --------------------------------------------------------------------------------------


def test_findings_are_on_disk_after_every_call_and_no_time_left_is_said(tmp_path):
    file = tmp_path / "part.json"
    assert read_findings(file)["tables"] == {}
    findings = Findings(file, tmp_path, "cpu", True, seconds=10)
    findings.row("A", x="1")
    assert read_findings(file)["tables"] == {"A": [{"x": "1"}]}
    assert findings.time_for("a short thing", 5)
    assert not findings.time_for("a long thing", 60)
    assert read_findings(file)["left_out"] == ["a long thing: no time left"]


def test_a_table_has_every_column_of_any_row_and_aligns_figures_to_the_right():
    lines = table_of([{"name": "a", "ms": "1.5"}, {"name": "b", "ms": "", "MB": "3"}]).splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")] == ["name", "ms", "MB"]
    assert [c.startswith(":") for c in lines[1].strip("|").split("|")] == [True, False, False]


# ---- the command -------------------------------------------------------------------------------------------


def test_what_the_check_needs_is_what_the_project_depends_on():
    project = (CHECKOUT / "pyproject.toml").read_text()
    depends = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    bounds = {line.partition(",")[0] for line in re.findall(r'"([^"]+)"', depends)}
    assert set(NEEDED.values()) <= bounds


def test_missing_packages_are_one_message_before_slow_imports(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NEEDED, "no_such_module", "no-such-package>=1")
    monkeypatch.setattr(sys, "argv", ["mom gpu-check", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("mom gpu-check: error: this Python (")
    assert "-m pip install 'no-such-package>=1'\n" in message
    assert not (tmp_path / "out").exists()


def test_presets_are_those_of_the_papers_configs():
    from mom_tools.bench.gpu_runs import PRESETS as trained
    from mom_tools.bench.gpu_steps import PRESETS as timed

    for name, file in (("37M", "37m"), ("1.5B", "1.5b"), ("443M", "443m")):
        model = yaml.safe_load((CHECKOUT / f"configs/chameleon/_{file}.yaml").read_text())["model"]
        transformer = yaml.safe_load((CHECKOUT / f"configs/chameleon/{file}-transformer.yaml").read_text())["model"]
        if name in timed:
            expected = (model["dim"], model["layers"], transformer["heads"])
            assert expected == (timed[name].dim, timed[name].layers, timed[name].heads)
        if name in trained:
            assert trained[name] == (model["dim"], model["layers"])


def test_an_operator_that_computes_something_wrong_is_named(tmp_path, monkeypatch):
    from mom_tools.bench import gpu_kernels

    right = gpu_kernels.selective_scan
    broken = lambda *a, **k: (right(*a, **k)[0] * 1.001, right(*a, **k)[1])  # noqa: E731
    monkeypatch.setattr(gpu_kernels, "selective_scan", broken)
    findings = Findings(tmp_path / "part.json", tmp_path, "cpu", True, 60)
    import torch

    error = lambda: gpu_kernels.carried_scan_error(findings, "torch", torch.float32)  # noqa: E731
    gpu_kernels.checked(findings, "scan", "ours, torch", 1e-5, error)
    assert re.match(r"scan, ours, torch: \de-04|scan, ours, torch: \d\.\de-0[34]", findings.found["wrong"][0])


def test_a_wrong_product_in_fp8_and_other_bits_of_a_gradient_are_seen(tmp_path, monkeypatch):
    import torch

    from mom_tools.bench import gpu_graph, gpu_products

    findings = Findings(tmp_path / "part.json", tmp_path, "cpu", True, 60)
    assert gpu_products.fp8_error(findings, 3, "emulated") < 1e-2
    right = gpu_products.fp8_linear
    monkeypatch.setattr(gpu_products, "fp8_linear", lambda *a: right(*a) * 1.03)
    assert gpu_products.fp8_error(findings, 3, "emulated") > 1e-2
    values = torch.randn(5, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[3] = torch.nextafter(other[3], torch.tensor(9.0))
    assert gpu_graph.digest(values) == gpu_graph.digest(values.clone()) != gpu_graph.digest(other)
    assert gpu_graph.digest(values) != gpu_graph.digest(values.flip(0))


def test_a_difference_between_two_runs_is_seen():
    from mom_tools.bench.gpu_runs import greatest_difference

    a = [{"step": 1, "loss/total": 2.0, "grad_norm/total": 1.0, "perf/x": 1}]
    b = [{"step": 1, "loss/total": 2.0002, "grad_norm/total": 1.0, "perf/x": 2}]
    assert greatest_difference(a, b, "loss") == pytest.approx(1e-4, rel=1e-3)
    assert greatest_difference(a, b, "grad_norm") == 0
    assert greatest_difference(a, [], "loss") == float("inf")
    assert greatest_difference(a, [{"loss/total": float("nan")}], "loss") == float("inf")


def test_every_part_runs_on_a_cpu_in_a_tiny_size(tmp_path):
    ended = program("mom_tools.bench.gpu_check", "--tiny", "--device", "cpu", "--output", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    values, text = written(tmp_path)
    assert {name: part["state"] for name, part in values["parts"].items()} == {
        name: "done" for name in ("machine", *(part.name for part in PARTS))
    }
    assert {name: part["wrong"] for name, part in values["parts"].items() if part["wrong"]} == {}
    for name in ("card", "torch", "triton", "date", "commit", "command"):
        assert re.search(rf"^\* {name}: \S", text, re.MULTILINE), name
    assert "Tiny sizes" in text
    verdicts = [row["verdict"] for row in next(iter(values["parts"]["kernels"]["tables"].values()))]
    assert len(verdicts) > 30
    assert set(verdicts) == {"right"}
    [steps] = [rows for title, rows in values["parts"]["steps"]["tables"].items() if title.startswith("Step at")]
    assert [row["system"].partition(",")[0] for row in steps] == ["dense", "mixture", "transformer", "mot"]
    assert "not measured (no GPU)" in text
    assert not (tmp_path / "scratch").exists()
