"""Turn raw documents into token shards, in parallel between and inside input files, with the same bytes on every run.

    mom tokenize --config TOKENIZERS.yaml --input 'raw/*.tar' --output OUT --workers 8

The headers of the inputs are read once, and the inputs are cut into parts (--part-mib). The shards of a part depend on
the input, the tokenizers, --part-mib and --shard-mib, and not on the number of workers. A gzipped file is a single
part, because it cannot be read from the middle: gunzip a large .tar.gz first. A command that was killed and is started
again works on the parts that are not finished. Documents that cannot be read, or are larger than --max-... allows, are
left out, counted and listed in OUT/skipped.jsonl. The dataset is complete once OUT/manifest.json exists.

--submit runs the same on a Slurm cluster (or, to try it, as local processes): an array that reads the headers, an
array that tokenizes, and a job that commits the manifest. On other clusters, run it with --stripe 0/N .. N-1/N, and
then once without --stripe.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mom_data.documents.account import EMPTY, TOO_LARGE, Account, category, is_damage
from mom_data.documents.document import Limits, Reading
from mom_data.documents.inputs import check_modalities, files_of_side
from mom_data.documents.json_lines import MAX_CHARACTERS
from mom_data.documents.sample import TEXT_KEYS
from mom_data.shards.content import content_of
from mom_data.shards.format import write_manifest
from mom_data.shards.tokenize import (
    RECORDS,
    Index,
    Job,
    Settings,
    index,
    jobs_of,
    known_index,
    names_of,
    tokenize_part,
    tokenizing,
    with_a_document_held_out,
)
from mom_tokenizers.bundle import READY, Tokenizers, libraries
from mom_tokenizers.errors import UserError, exit_clearly, user_path
from mom_tokenizers.media.pictures import MAX_PIXELS
from mom_tools.options import add_input, add_json
from mom_tools.output import write_json

_REPORTED = 256  # samples between two touches of the shared counters
_progress: Any = None  # shared counters of documents and tokens, set in each worker
_pending = 0  # samples this worker has not reported yet
_device = "cpu"  # this worker's

Given = TypeVar("Given")
Made = TypeVar("Made")


def _start_worker(progress: Any, started: Any, devices: Sequence[str]) -> None:
    global _progress, _device
    # a pool's workers outlive a parent that was killed, and would work on beside those of a restart
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _progress = progress
    with started.get_lock():
        _device = devices[started.value % len(devices)]
        started.value += 1


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(documents: int, tokens: int) -> None:
    global _pending
    _pending += documents
    if tokens or _pending >= _REPORTED:
        with _progress.get_lock():
            _progress[0] += _pending
            _progress[1] += tokens
        _pending = 0


def _tokenize(job: Job) -> dict[str, Any]:
    try:
        with user_path(job.output):
            return tokenize_part(job, lambda: tokenizing(job.settings.tokenizers, _device), _report)
    except (UserError, MemoryError) as error:
        raise UserError(f"{job.name} (process {os.getpid()}): {error or 'out of memory'}") from error
    except Exception as error:
        raise RuntimeError(f"{job.name} (process {os.getpid()}): {type(error).__name__}: {error}") from error


def _index(arguments: tuple[Path, str, Settings, Path]) -> Index:
    source, _, _, output = arguments
    with user_path(source):
        content_of(source, output / RECORDS)  # all of it is read here, in a worker, and remembered for the jobs
        return index(*arguments)


def each(
    pool: ProcessPoolExecutor,
    work: Callable[[Given], Made],
    given: Mapping[str, Given],
    tick: Callable[[int], None],
) -> dict[str, Made]:
    """Name -> result of `work`. A failure does not stop the others, and one error at the end names all failures."""
    futures: dict[Future[Made], str] = {pool.submit(work, value): name for name, value in given.items()}
    waiting, running = set(futures), list(futures.values())
    made: dict[str, Made] = {}
    failed: list[str] = []
    try:
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5)
            for future in finished:
                try:
                    made[futures[future]] = future.result()
                except UserError as error:
                    failed.append(str(error))
            running = [futures[future] for future in waiting if future.running()]
            tick(len(made))
    except BrokenProcessPool:
        raise UserError(
            f"a worker was killed, perhaps for want of memory, at one of {', '.join(sorted(running)[:8])}. Finished "
            "parts are kept: run again, with fewer --workers if it was memory."
        ) from None
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    if failed:
        more = f"; and {len(failed) - 8} more" if len(failed) > 8 else ""
        raise UserError("; ".join(sorted(failed)[:8]) + more)
    return made


class Workers:
    """Processes that read headers and tokenize, with progress lines. Use as a context manager: they have ended when it
    is left, so that nothing is torn down beneath them while this process ends."""

    def __init__(self, number: int, devices: Sequence[str], modules: Sequence[str] = ()):
        """Starts nothing yet: the processes are started with the first job. Each is forked from one process that has
        imported what they need and has run nothing, because forking beside torch's threads can hang."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mom_data.shards.tokenize", *modules])
        self._progress = context.Array("q", 2)
        started = context.Value("q", 0)
        self.pool = ProcessPoolExecutor(number, context, _start_worker, (self._progress, started, list(devices)))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def index(self, sources: Mapping[str, Path], settings: Settings, output: Path) -> dict[str, Index]:
        """Name of each source -> its index."""
        known = {name: known_index(source, name, settings, output) for name, source in sources.items()}
        left = {name: (sources[name], name, settings, output) for name, found in known.items() if found is None}
        with self._bar(unit="file", desc="read headers", total=len(sources)) as bar:
            found = each(self.pool, _index, left, lambda done: _to(bar, len(sources) - len(left) + done))
        return {name: known[name] or found[name] for name in sources}

    def tokenize(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """Name of each job -> its record. Finished jobs are not done again."""
        done = {job.name: record for job in jobs if (record := job.finished()) is not None}
        left = {job.name: job for job in jobs if job.name not in done}
        before = sum(job.part.documents for job in jobs if job.name in done)
        start = time.perf_counter()

        def tick(finished: int) -> None:
            rate = self._progress[1] / (time.perf_counter() - start)
            bar.set_postfix_str(f"{rate:,.0f} tok/s, {finished}/{len(left)} parts", refresh=False)
            _to(bar, before + self._progress[0])

        with self._bar(unit="doc", desc="tokenize", initial=before,
                       total=sum(job.part.documents for job in jobs)) as bar:  # fmt: skip
            return done | each(self.pool, _tokenize, left, tick)

    @staticmethod
    def _bar(**options: Any) -> Any:
        return tqdm(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10, **options)


def _to(bar: Any, n: int) -> None:
    bar.update(n - bar.n)


def commit(
    jobs: Sequence[Job], records: Mapping[str, Mapping[str, Any]], account: Account, max_bad_fraction: float
) -> dict[str, Any]:
    """Write the manifest, unless too much could not be read. `account` is that of the input files, and the accounts of
    their members are added to it here. Returns the figures of the data set."""
    output, settings = jobs[0].output, jobs[0].settings
    ordered = [records[job.name] for job in jobs]
    shards = [s for record in ordered for s in record["shards"] if s["documents"]]
    skipped = [entry for record in ordered for entry in record["skipped"]]
    (output / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in skipped))
    for record in ordered:
        account.add(Account.from_json(record["account"]))
    documents = sum(s["documents"] for s in shards)
    assert account.documents == documents, f"{account.documents} documents accounted for, {documents} in the shards"
    if not documents:
        raise UserError(
            f"no document could be read from the inputs; see {output}/skipped.jsonl, and what became of them:\n"
            + account.text()
        )
    refuse_bad_share(account, max_bad_fraction, f"{output}/skipped.jsonl")
    reasons = Counter(category(entry["reason"]) for entry in skipped)
    write_manifest(output, shards, settings.described, settings.token_dtype, reasons, account.as_json())
    tokens = {m: sum(s["tokens"][m] for s in shards) for m in settings.described}
    return {"documents": documents, "shards": len(shards), "tokens": tokens,
            "unreadable": sum(n for reason, n in reasons.items() if is_damage(reason)),
            "above_limits": reasons[TOO_LARGE], "empty": reasons[EMPTY], "account": account.as_json(),
            **({"latents_at_limit": n} if (n := sum(s.get("latents_at_limit", 0) for s in shards)) else {}),
            }  # fmt: skip


def refuse_bad_share(account: Account, most: float, listed: str) -> None:
    """Raise UserError where more than the share `most` of samples, members or files is damaged or not understood."""
    done = "What is done is kept: run again with a larger share to commit it."
    bad, of = account.bad_samples
    if bad > most * of:
        raise UserError(
            f"{bad} of {of} documents could not be read, more than --max-bad-fraction {most}; {listed} lists them. "
            f"{account.worst()}. {done}"
        )
    bad, of = account.bad_members
    if bad > most * of:
        raise UserError(
            f"{bad} of {of} members of the inputs are left out, more than --max-bad-fraction {most}: "
            f"{account.worst()}. Name extensions that are to be left out with --ignore. {done}"
        )
    bad, of = account.bad_files
    if bad > most * of:
        raise UserError(
            f"{bad} of {of} files in the input folders are not read, more than --max-bad-fraction {most}:\n"
            f"{account.text()}\nName the files that are meant as --input, or unpack the others. {done}"
        )


def submit(options: argparse.Namespace, rest: Sequence[str], inputs: int, output: Path) -> None:
    """Submit the three steps as jobs. Each runs this program with the arguments that it was called with."""
    try:
        from submitit import AutoExecutor
        from submitit.core.utils import UncompletedJobError
        from submitit.helpers import Checkpointable, CommandFunction
    except ImportError:
        raise UserError("--submit needs submitit: pip install 'mixture-of-mamba[slurm]'") from None

    class Step(CommandFunction, Checkpointable):
        """A job whose command is started again after a time-out or preemption, and goes on where it was."""

    tool = [sys.executable, "-m", "mom_tools.data.tokenize_shards", "--workers", str(options.cpus_per_task), *rest]
    size = options.array_size
    headers = min(size, inputs)
    steps: dict[str, list[list[str]]] = {
        "index": [["--index-only", "--stripe", f"{k}/{headers}"] for k in range(headers)],
        "tokenize": [["--stripe", f"{k}/{size}"] for k in range(size)],
        "commit": [[]],
    }
    slurm = {"partition": options.partition, "account": options.account, "array_parallelism": size}
    after: dict[str, str] = {}
    for step, tasks in steps.items():
        gpus = options.gpus_per_task if step == "tokenize" else 0
        shown = [f"{key} {value}" for key, value in {**slurm, **after}.items() if value and options.submit == "slurm"]
        print(f"{step}: {len(tasks)} x {options.cpus_per_task} cpus, {gpus} gpus, {options.time} min"
              + "".join(f", {one}" for one in shown) + ":\n  " + " ".join([*tool, *tasks[0]]), flush=True)  # fmt: skip
        if options.dry_run:
            after = {"dependency": f"afterok:<{step}>"}
            continue
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # a folder of its own: job numbers can come again
        try:
            executor = AutoExecutor(output / ".submit" / stamp / step / "%j", options.submit)
        except RuntimeError as error:
            raise UserError(f"--submit {options.submit}: {error}") from error
        extra = {**after, "kill-on-invalid-dep": "yes"} if after else {}
        executor.update_parameters(
            name=f"tokens-{step}", timeout_min=options.time, cpus_per_task=options.cpus_per_task,
            gpus_per_node=gpus, nodes=1, tasks_per_node=1, slurm_additional_parameters=extra,
            **{f"slurm_{key}": value for key, value in slurm.items() if value},
        )  # fmt: skip
        with executor.batch():
            jobs = [executor.submit(Step([*tool, *task])) for task in tasks]
        if options.submit == "slurm":
            number = jobs[0].job_id.split("_")[0]
            after = {"dependency": f"afterok:{number}"}
            print(f"  job {number}; logs in {jobs[0].paths.folder.parent}", flush=True)
            continue
        for job in jobs:
            try:
                print("  " + (job.result().strip().splitlines() or ["done"])[-1], flush=True)
            except UncompletedJobError:
                raise UserError(f"{step}: a task ended without a result; its log: {job.paths.stderr}") from None
            except Exception as error:
                raise UserError(f"{step}: {str(error).strip().splitlines()[-1]} (log: {job.paths.stderr})") from error


def stripe(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and int(k) < int(n)):
        raise argparse.ArgumentTypeError(f"expected K/N with 0 <= K < N, got {text!r}")
    return int(k), int(n)


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parse() -> tuple[argparse.Namespace, argparse.Namespace, list[str]]:
    """(the arguments of the tokenization, the arguments of the submission, the command line without the latter)."""
    cluster = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = cluster.add_argument_group("on a cluster")
    group.add_argument(
        "--submit", nargs="?", const="slurm", choices=["slurm", "local"], help="run as jobs, through submitit"
    )
    group.add_argument("--dry-run", action="store_true", help="with --submit, only say what would be submitted")
    group.add_argument("--array-size", type=int, default=8, metavar="N", help="tasks of a job array (%(default)s)")
    group.add_argument("--partition", help="Slurm partition of the jobs")
    group.add_argument("--account", help="Slurm account of the jobs")
    group.add_argument("--time", type=int, default=1440, metavar="MINUTES", help="time limit of a task (%(default)s)")
    group.add_argument("--cpus-per-task", type=int, default=8, help="cores of a task, and its --workers (%(default)s)")
    group.add_argument(
        "--gpus-per-task", type=int, default=0, help="GPUs of a task, with one worker for each (%(default)s)"
    )

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[cluster], allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="tokenizers.yaml, as train_tokenizers.py writes it")
    add_input(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="device of the models, with one worker for each GPU",
    )
    parser.add_argument(
        "--split", choices=["train", "val"], help="tokenize only this side of a division by document keys"
    )
    parser.add_argument(
        "--holdout", type=float, default=0.03, help="share of documents in val, with --split (%(default)s)"
    )
    parser.add_argument("--drop-modalities", nargs="+", default=(), metavar="MODALITY",
                        help="modalities whose segments are left out; documents that have no others are left out too, "
                        "and none of them counts as bad")  # fmt: skip
    parser.add_argument("--text-key", nargs="+", default=(), metavar="KEY",
                        help="keys that hold the text, in the JSON beside a picture or recording or in a line of JSON "
                        "lines; the first one found goes before any .txt (default, tried after .txt: "
                        f"{' '.join(TEXT_KEYS)})")  # fmt: skip
    parser.add_argument("--ignore", nargs="+", default=(), metavar="EXTENSION",
                        help="extensions (npz, srt) of members to leave out, which do not count as bad")  # fmt: skip
    parser.add_argument(
        "--max-pixels", type=positive, default=MAX_PIXELS, help="leave out pictures with more pixels (%(default)s)"
    )
    parser.add_argument("--max-seconds", type=positive, default=7200, help="leave out longer recordings (%(default)s)")
    parser.add_argument(
        "--max-characters", type=positive, default=MAX_CHARACTERS, help="leave out longer texts (%(default)s)"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        help="fail where a larger share of documents is damaged (default: %(default)s)",
    )
    parser.add_argument(
        "--part-mib",
        type=positive,
        default=256,
        help="size of the parts that raw input is cut into, in MiB (%(default)s)",
    )
    parser.add_argument(
        "--shard-mib", type=positive, default=128, help="size in MiB at which a new shard begins (%(default)s)"
    )
    parser.add_argument(
        "--stripe", type=stripe, metavar="K/N", help="work on every N-th part, from the K-th on, and commit nothing"
    )
    parser.add_argument(
        "--index-only", action="store_true", help="only read the headers of the inputs, or of those of the stripe"
    )
    add_json(parser)
    arguments = parser.parse_args()
    options, rest = cluster.parse_known_args()
    return arguments, options, rest


def settings_of(arguments: argparse.Namespace) -> Settings:
    described = Tokenizers.load(arguments.config).describe()
    if both := [m for m in arguments.drop_modalities if m in described]:
        raise UserError(f"--drop-modalities {both[0]}: {arguments.config} has a tokenizer for it; take it out there")
    if arguments.max_pixels > MAX_PIXELS:
        raise UserError(f"--max-pixels {arguments.max_pixels:.0f}: no picture above {MAX_PIXELS} is ever unpacked")
    if arguments.max_characters > MAX_CHARACTERS:
        raise UserError(
            f"--max-characters {arguments.max_characters:.0f}: no text above {MAX_CHARACTERS} is read; cut it into "
            "documents where that makes sense"
        )
    limits = Limits(int(arguments.max_pixels), arguments.max_seconds, int(arguments.max_characters))
    return Settings(
        arguments.config, described, int(arguments.part_mib * 2**20), int(arguments.shard_mib * 2**20),
        arguments.split, arguments.holdout, tuple(arguments.drop_modalities), limits,
        Reading(tuple(arguments.text_key), frozenset(e.lower().lstrip(".") for e in arguments.ignore)),
    )  # fmt: skip


def devices_of(wanted: str, settings: Settings) -> list[str]:
    """The devices on which models run: every GPU of the machine, or the CPU."""
    if all(t["kind"] in ("bpe", READY) for t in settings.described.values()) or wanted == "cpu":
        return ["cpu"]
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    return [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"]


def main() -> None:
    arguments, options, rest = parse()
    with exit_clearly():
        account = Account()
        sources, arguments.split = files_of_side(arguments.input, arguments.split, account)
        names = names_of(sources)
        settings = settings_of(arguments)
        output: Path = arguments.output
        check_modalities(sources, arguments.config, settings.described, settings.drop)
        if options.submit:
            submit(options, rest, len(sources), output)
            return
        if arguments.stripe and hasattr(signal, "SIGUSR2"):
            # submitit's signal before a time-out reaches every process of the step; submitit itself acts on it
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        start = time.perf_counter()
        devices = devices_of(arguments.device, settings)
        k, n = arguments.stripe or (0, 1)
        named = dict(zip(names, sources, strict=True))
        number = max(1, arguments.workers if devices == ["cpu"] else len(devices))
        modules = [] if arguments.index_only else libraries(t["kind"] for t in settings.described.values())
        with Workers(number, devices, modules) as workers:
            if arguments.index_only:
                found = workers.index(dict(list(named.items())[k::n]), settings, output)
                print(f"{output}: {sum(len(i.parts) for i in found.values())} parts in {len(found)} inputs")
                return
            found = workers.index(named, settings, output)
            held_out = with_a_document_held_out(settings, list(found.values()))
            if held_out != settings:
                settings, found = held_out, workers.index(named, held_out, output)
            jobs = jobs_of(sources, names, [found[name].parts for name in names], settings, output)
            records = workers.tokenize(jobs[k::n])
        if arguments.stripe:
            print(f"{output}: {len(records)} of {len(jobs)} parts finished; run without --stripe to commit")
            return
        figures = commit(jobs, records, account, arguments.max_bad_fraction)
        figures["seconds"] = round(time.perf_counter() - start, 3)
        if write_json(arguments.json, figures):
            print(account.text())
            print(
                f"{output}: {figures['documents']:,} documents in {figures['shards']} shards, "
                + ", ".join(f"{count:,} {m}" for m, count in figures["tokens"].items())
                + f" tokens, {figures['unreadable']} unreadable, {figures['above_limits']} too large and "
                f"{figures['empty']} empty ones skipped"
            )
        if clipped := figures.get("latents_at_limit"):
            print(clipped_warning(clipped, output), file=sys.stderr)


def clipped_warning(values: int, where: object) -> str:
    """What to tell a user whose latents exceeded float16."""
    return (
        f"warning: {where}: {values:,} values of latents are beyond 65,504, the largest of float16, and were "
        "clipped to it. Latents of a working autoencoder are tens at most: look at what it brings "
        "back (mom inspect)."
    )


if __name__ == "__main__":
    main()
