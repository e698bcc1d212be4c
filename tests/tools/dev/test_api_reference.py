"""docs/reference/api says what the docstrings say."""

import subprocess
import sys

from tests.helpers import CHECKOUT

TOOL = CHECKOUT / "tools/dev/api_reference.py"


def test_the_pages_are_up_to_date():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nrun: python tools/dev/api_reference.py"
    page = (CHECKOUT / "docs/reference/api/ops.md").read_text()
    assert "from mom_train.ops.scan.selective_scan import selective_scan" in page
    assert "dt_bias_MD: Tensor" in page


def test_an_old_page_is_noticed(tmp_path):
    (tmp_path / "tokenizers.md").write_text("# Tokenizers\n")
    done = subprocess.run([sys.executable, TOOL, "--check", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "run python tools/dev/api_reference.py" in done.stderr
