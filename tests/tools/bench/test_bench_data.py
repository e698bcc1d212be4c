import json

import pytest

from tests.helpers import CHECKOUT
from tests.helpers.ranks import program

TOOL = CHECKOUT / "tools" / "bench_data.py"


def run(*arguments):
    return program(TOOL, *arguments)


@pytest.mark.parametrize("kind", ["transfusion", "chameleon"])
def test_every_reader_is_measured_and_ours_meet_every_document(kind):
    small = ("--tokens", 60_000, "--length", 2048, "--rows", 2, "--repeats", 1, "--workers", 0, 1)
    done = run("--synthetic", kind, *small, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["measured"]}
    assert len(rows) == 8
    assert all(row["tokens"] > 0 and row["cpu"] > 0 for row in rows.values())
    assert result["format"]["tokens"] >= 60_000
    # the index alone has offset, crc and a segment's fields: at least 21 bytes a document
    assert result["format"]["index_bytes_per_document"] > 21
    assert rows["end to end, 1 loader workers"]["worker_rss"] > 0
    # one full pass over the documents reads what the tars hold
    blocks = rows["webdataset, our blocks in order"]
    assert blocks["tokens"] == result["format"]["tokens"]


def test_a_folder_without_shards_is_one_clear_message(tmp_path):
    done = run("--data", tmp_path)
    assert done.returncode == 2
    assert "no manifest.json" in done.stderr
    assert "Traceback" not in done.stderr
