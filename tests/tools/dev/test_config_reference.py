"""docs/reference/configuration.md says what the schema says."""

import subprocess
import sys

from mom_train.config.run import RunConfig
from mom_train.config.section import Section
from tests.helpers import CHECKOUT

TOOL = CHECKOUT / "tools/dev/config_reference.py"


def test_the_reference_is_up_to_date():
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nrun: python tools/dev/config_reference.py"


def test_an_old_reference_is_noticed(tmp_path):
    old = tmp_path / "configuration.md"
    old.write_text("# Configuration\n")
    done = subprocess.run([sys.executable, TOOL, "--check", "--out", old], capture_output=True, text=True)
    assert done.returncode == 2
    assert "run python tools/dev/config_reference.py" in done.stderr


def test_every_key_of_every_section_is_in_it():
    text = (CHECKOUT / "docs/reference/configuration.md").read_text()
    sections = [RunConfig, *Section.__subclasses__()]
    assert len(sections) > 10
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if f"| `{name}` |" not in text
        or (field.description and " ".join(field.description.split()).replace("<", "\\<") not in text)
    ]
    assert missing == []
