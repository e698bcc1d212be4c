"""Submits a run to Slurm with submitit, together with a copy of the code and the config as they are now."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mom_tokenizers.errors import UserError
from mom_train.config.files import load_config
from mom_train.config.run import RunConfig
from mom_train.config.section import PATH_KEYS
from torchrun_launch.job import NodeTask
from torchrun_launch.record import check_free, replace_json, write_record

_PACKAGES = ("torchrun_launch", "mom_train", "mom_data", "mom_tokenizers", "mom_tools")


@dataclass(frozen=True)
class Request:
    """The options of a job: what Slurm is asked for, and how often the job may be restarted and requeued."""

    nodes: int
    gpus_per_node: int
    nproc_per_node: int
    cpus_per_task: int | None = None
    time: str = "24:00:00"
    name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    container_image: str | None = None
    container_mounts: str | None = None
    sbatch: dict[str, str] = field(default_factory=dict)
    """Any further option of sbatch, by its long name."""
    array_parallelism: int = 256
    signal_delay: int = 120
    max_requeues: int = 100
    max_restarts: int = 3
    rendezvous_timeout: int = 300

    def parameters(self, name: str, code: Path, run_dirs: Sequence[Path]) -> dict[str, Any]:
        """The parameters of submitit's executor."""
        srun = ["--kill-on-bad-exit=0", "--wait=0", "--open-mode=append"]
        if self.container_image is not None:
            mounts = [self.container_mounts] if self.container_mounts else []
            mounts += [f"{folder}:{folder}" for folder in sorted({code.parent, *run_dirs})]
            srun += [f"--container-image={self.container_image}", f"--container-mounts={','.join(mounts)}"]
            srun.append(f"--container-workdir={code}")
        asked = ("nodes", "cpus_per_task", "partition", "account", "qos", "constraint", "exclude", "array_parallelism")
        return {
            **{key: getattr(self, key) for key in asked if getattr(self, key) is not None},
            **({"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}),
            "job_name": self.name or name,
            "ntasks_per_node": 1,
            "signal_delay_s": self.signal_delay,
            "stderr_to_stdout": True,
            "wckey": None,
            "srun_args": srun,
            # chdir makes the copied code run, because `python -m` looks for packages in the working directory first.
            "additional_parameters": {"time": self.time, "requeue": True, "chdir": str(code), **self.sbatch},
        }


def submit(
    configs: Sequence[str], overrides: Sequence[str], request: Request, command: Sequence[str], dry_run: bool = False
) -> dict[str, Any]:
    """Submit one job, or an array of jobs with one task per config.

    Returns {"jobs": {run_dir: job id}, "folder": ..., "script": the text of the batch script}. With `dry_run` nothing
    is written or submitted, and the job ids are None. Raises UserError for a wrong config, for a run_dir that is in use
    or named twice, and where sbatch refuses the job.
    """
    named = [(config, [o.replace("{config}", Path(config).stem) for o in overrides]) for config in configs]
    runs = [absolute(load_config(config, own)) for config, own in named]
    run_dirs = [run.run_dir for run in runs]
    if len(set(run_dirs)) < len(run_dirs):
        raise UserError(
            f"run_dir: {len(run_dirs)} runs need as many, their configs name {len(set(run_dirs))}; "
            "in 'run_dir=runs/seed-1/{config}' a config's own name stands for {config}"
        )
    for run in runs:
        run.accumulation(request.nodes * request.nproc_per_node)
        check_free(run.run_dir)
    unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = Path(os.path.commonpath(run_dirs)) / "submissions" / unique
    parameters = request.parameters(
        run_dirs[0].name if len(runs) == 1 else folder.parents[1].name, folder / "code", run_dirs
    )
    if "%" in str(folder):
        raise UserError(f"run_dir {run_dirs[0]}: Slurm would replace the % in its name")
    submitit = _submitit()
    python = "python3" if request.container_image is not None else None
    if dry_run:
        text = submitit.slurm.slurm._make_sbatch_string(
            command=shlex.join([python or "python", "-u", "-m", "submitit.core._submit", str(folder / "jobs")]),
            folder=folder / "jobs",
            map_count=len(runs) if len(runs) > 1 else None,
            **parameters,
        )
        return {"jobs": dict.fromkeys(map(str, run_dirs)), "folder": str(folder), "script": text}

    version = copy_code(folder / "code")
    tasks = []
    for run in runs:
        submission = run.run_dir / "submissions" / unique
        submission.mkdir(parents=True, exist_ok=True)
        (submission / "config.yaml").write_text(run.to_yaml())
        tasks.append(
            NodeTask(
                submission=str(submission),
                code=str(folder / "code"),
                run_dir=str(run.run_dir),
                ranks=request.nproc_per_node,
                max_restarts=request.max_restarts,
                max_requeues=request.max_requeues,
                rendezvous_timeout=request.rendezvous_timeout,
                shutdown_timeout=request.signal_delay,
            )
        )
    try:
        executor = submitit.SlurmExecutor(folder=folder / "jobs", python=python)
        executor.update_parameters(**parameters)
        with executor.batch() if len(tasks) > 1 else nullcontext():
            jobs = [executor.submit(task) for task in tasks]
    except (RuntimeError, submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        shutil.rmtree(folder)
        raise UserError(f"the job was not submitted: {error}") from None
    for run, job in zip(runs, jobs, strict=True):
        record = {
            "kind": "slurm",
            "job": job.job_id,
            "submission": str(run.run_dir / "submissions" / unique),
            "output": str(folder / "jobs"),
            "command": list(command),
            "request": asdict(request),
            **version,
        }
        replace_json(run.run_dir / "submissions" / unique / "submission.json", record)
        write_record(run.run_dir, record)
    script = next((folder / "jobs").glob("*_submission.sh")).read_text()
    return {
        "jobs": {str(run.run_dir): job.job_id for run, job in zip(runs, jobs, strict=True)},
        "folder": str(folder),
        "script": script,
    }


def sweep(pattern: str) -> list[str]:
    """The configs that the pattern matches, sorted. Raises UserError where there are none."""
    found = sorted(glob.glob(pattern))
    if not found:
        raise UserError(f"--sweep {pattern}: no such file. Quote the pattern, and give it from here ({os.getcwd()})")
    return found


def absolute(config: RunConfig) -> RunConfig:
    """The config with every path made absolute, so that it means the same in another working directory.

    Paths are values of type Path, and texts in the keys of PATH_KEYS. URLs stay as they are.
    """

    def of(value: Any, name: str = "") -> Any:
        if isinstance(value, BaseModel):
            return value.model_copy(update={key: of(inner, key) for key, inner in value})
        if isinstance(value, dict):
            return {key: of(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(of(inner, name) for inner in value)
        if isinstance(value, Path):
            return value.absolute()
        if name in PATH_KEYS and isinstance(value, str) and "://" not in value:
            if name == "raw" and not Path(value).exists():  # a glob; the folder before it must not be taken for one
                return value if Path(value).is_absolute() else str(Path(glob.escape(os.getcwd()), value))
            return str(Path(value).absolute())
        return value

    return of(config)


def copy_code(target: Path) -> dict[str, Any]:
    """Copy the project's packages, from a checkout or from where they are installed. Returns {"version"}, and from a
    git checkout also "commit" and "edited", which says whether files differ from the commit."""
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(next(iter(spec.submodule_search_locations)), target / name, ignore=ignored)
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        edited = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        commit = None
    version: dict[str, Any] = {"version": importlib.metadata.version("mixture-of-mamba")}
    if commit is not None and commit.returncode == 0:
        version |= {"commit": commit.stdout.strip(), "edited": bool(edited)}
    return version


def _submitit() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError:
        raise UserError("submit needs submitit: pip install 'mixture-of-mamba[slurm]'") from None
    return submitit
