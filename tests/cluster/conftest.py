"""A cluster for the tests of this folder: hosts that are network namespaces, a Slurm on three of them.

They need root and Debian's Slurm (slurm.py says which packages). Where they cannot run they are skipped with the
reason; with MOM_REQUIRE_CLUSTER=1, as in `make cluster`, that is a failure.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.helpers import hosts as hosts_module
from tests.helpers import slurm as slurm_module


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def cannot(reason):
    if os.environ.get("MOM_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"MOM_REQUIRE_CLUSTER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm():
    reason = slurm_module.why_not()
    if reason is not None:
        cannot(reason)
    root = Path(tempfile.mkdtemp(prefix="mom-slurm-"))
    try:
        with slurm_module.Slurm(root, nodes=3) as cluster:
            yield cluster
    finally:
        if os.environ.get("MOM_KEEP_CLUSTER") != "1":
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def hosts(tmp_path):
    reason = hosts_module.why_not()
    if reason is not None:
        cannot(reason)
    with hosts_module.Hosts(tmp_path, 2) as two:
        yield two


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with token shards and the config.yaml of a run of 0.07 M parameters."""
    from tests.helpers.run_config import write_config

    folder = tmp_path_factory.mktemp("tiny")
    write_config(folder, validation={"sequences": 1})
    return folder
