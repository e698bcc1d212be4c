"""The console command `mom` reaches every command, and tools/*.py are the same commands under their file names."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest

from mom_tools.__main__ import COMMANDS, MODULES, main, usage
from tests.helpers import CHECKOUT


def test_every_command_has_a_module_with_a_main_and_a_line_in_the_usage():
    for group, commands in COMMANDS.items():
        assert f"\n{group}:" in usage()
        for name, (module, purpose) in commands.items():
            assert re.search(rf"^  {name} +{re.escape(purpose)}$", usage(), re.MULTILINE)
            run = importlib.import_module(module).main
            # what it returned would be lost: a command that fails exits
            assert inspect.signature(run).return_annotation == "None", module


def test_a_tool_file_runs_the_module_of_a_command():
    for file in (CHECKOUT / "tools").glob("*.py"):
        [module] = re.findall(r"^from (\S+) import main$", file.read_text(), re.MULTILINE)
        assert module in MODULES.values(), f"{file.name}: no command of mom runs {module}"


@pytest.mark.parametrize(
    ("name", "message"), [("tokenise", "did you mean 'tokenize'?"), ("xyzzy", "mom --help lists the commands.")]
)
def test_an_unknown_command_is_one_line_with_exit_code_2(name, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mom", name])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"mom: there is no command '{name}'; {message}\n"


def test_the_installed_program_hands_arguments_on(tmp_path):
    mom = [sys.executable, "-m", "mom_tools"]
    asked = subprocess.run([*mom, "describe", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert asked.returncode == 0
    assert asked.stdout.startswith("usage: mom describe ")
    local = subprocess.run([*mom, "local", "none.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert local.returncode == 2
    assert "no config file none.yaml" in local.stderr
