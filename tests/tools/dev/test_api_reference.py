"""docs/reference/api says what the docstrings say."""

import runpy
import sys

import pytest

from tests.helpers import CHECKOUT

TOOL = CHECKOUT / "tools/dev/api_reference.py"


@pytest.fixture(scope="module")
def tool():
    """The names in the program, with pages that are made only once, because reading all sources takes seconds."""
    names = runpy.run_path(str(TOOL))
    found = names["pages"]()
    names["main"].__globals__["pages"] = lambda: found
    return names["main"]


def test_the_pages_are_up_to_date(tool, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--check"])
    tool()
    page = (CHECKOUT / "docs/reference/api/ops.md").read_text()
    assert "from mom_train.ops.scan.selective_scan import selective_scan" in page
    assert "dt_bias_MD: Tensor" in page


def test_an_old_page_is_noticed(tool, monkeypatch, tmp_path, capsys):
    (tmp_path / "tokenizers.md").write_text("# Tokenizers\n")
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        tool()
    assert end.value.code == 2
    assert "run python tools/dev/api_reference.py" in capsys.readouterr().err
