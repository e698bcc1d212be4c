"""Orders the tests: the longest files come first, so that no worker is left alone with one of them at the end."""

import os

import pytest

# minutes each, most first; a file that is not named comes after them, as it was collected
LONGEST = (
    "demo/test_tutorial.py",
    "demo/test_demo.py",
    "faults/test_campaign.py",
    "data/test_tokenize_shards.py",
    "train/test_settings.py",
    "paper/test_paper_mini.py",
    "shards/test_online.py",
    "checkpoint/test_checkpoint.py",
    "launch/test_launch.py",
    "bench/test_bench.py",
    "model/test_describe_model.py",
    "distributed/test_ranks.py",
    "train/test_validation.py",
    "train/test_run.py",
    "train/test_survival.py",
)


def pytest_collection_modifyitems(items):
    place = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores, because tests of launchers and signals mostly wait."""
    return (os.cpu_count() or 1) + 1
