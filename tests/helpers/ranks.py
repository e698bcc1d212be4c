"""Starts ranks for tests, in processes forked from one that has already imported torch and the trainer."""

import fcntl
import importlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from mom_tokenizers.bundle import KINDS, libraries
from tests.helpers import CHECKOUT


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank, world_size, port, function, args, results):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def _forking():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mom_train.trainer", "torch._dynamo", "torch.utils.tensorboard", *libraries(KINDS)])
    return context


def _reuse_forkserver():
    """Let this process fork its own workers from the server that it was forked from, instead of starting another."""
    server = multiprocessing.forkserver
    server.ensure_running = server._forkserver.ensure_running = multiprocessing.resource_tracker.ensure_running


def _command(arguments, environment, output):
    sys.stdout.flush()
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(CHECKOUT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["mom_train", *arguments]
    from mom_train.__main__ import main

    main()


def mom_train(config, *overrides, timeout=900):
    """Run `python -m mom_train CONFIG OVERRIDES`. Returns (exit code, what it printed)."""
    with tempfile.NamedTemporaryFile() as output:
        arguments = [str(config), *overrides]
        process = _forking().Process(target=_command, args=(arguments, dict(os.environ), output.name))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return process.exitcode, Path(output.name).read_text()


def start_mom_train(config, *overrides, output):
    """Start `python -m mom_train CONFIG OVERRIDES`, which writes what it prints to `output`. Returns the process."""
    arguments = [str(config), *overrides]
    process = _forking().Process(target=_command, args=(arguments, dict(os.environ), str(output)))
    process.start()
    return process


def _program(module, arguments, environment, folder, output, errors):
    for path, number in ((output, 1), (errors, 2)):
        with open(path, "wb", buffering=0) as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _reuse_forkserver()
    if module.endswith(".py"):
        sys.argv = [module, *arguments]
        runpy.run_path(module, run_name="__main__")
    else:
        sys.argv = [module.rpartition(".")[2], *arguments]
        importlib.import_module(module).main()


def program(module, *arguments, cwd=CHECKOUT, timeout=900):
    """Run `main` of a module as `python -m MODULE ARGUMENT ...` does, or of a script as `python FILE.py ARGUMENT ...`
    does, without the seconds that a new process needs to import torch."""
    module, *arguments = map(str, (module, *arguments))
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        given = (module, arguments, dict(os.environ), str(cwd), str(output), str(errors))
        process = _forking().Process(target=_program, args=given)
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        ended = subprocess.CompletedProcess([module, *arguments], process.exitcode)
        ended.stdout, ended.stderr = output.read_text(), errors.read_text()
        return ended


def _ranked_command(rank, world_size, port, prepare, arguments, output):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if prepare is not None:
        prepare(rank)
    _command(arguments, {**os.environ, **address, **place, "OMP_NUM_THREADS": "1"}, output)


def mom_train_ranks(world_size, prepare, config, *overrides, timeout=120):
    """Run `mom_train CONFIG OVERRIDES` on several ranks without torchrun, so that nobody ends the other ranks when one
    fails. Returns [(exit code, what it printed), ...]. Each process calls `prepare(rank)` first, with which a test can
    make it fail."""
    port, context = free_port(), _forking()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(world_size)]
        readers = [_pipe(output) for output in outputs]
        ranks = [
            context.Process(
                target=_ranked_command,
                args=(rank, world_size, port, prepare, [str(config), *overrides], str(outputs[rank])),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
            process.kill()
            process.join()
        printed = [(reader.read() or b"").decode() for reader in readers]  # None if nothing came and the pipe is open
        return [(process.exitcode, text) for process, text in zip(ranks, printed, strict=True)]


def _pipe(path):
    """A named pipe that holds a megabyte, through which a process that may not write to files can still print."""
    os.mkfifo(path)
    reader = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)
    return reader


def run_ranks(world_size, function, *args, timeout=900):
    """Run function(*args) on each rank and return the results in a list. Raises with the traceback of the first rank
    that fails. The function must be importable, and its result must be picklable without torch (numpy arrays,
    numbers)."""
    context = _forking()
    results, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_rank, args=(r, world_size, port, function, args, results), daemon=True)
        for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    returned = {}
    try:
        for _ in ranks:
            rank, fine, value = results.get(timeout=timeout)
            assert fine, f"rank {rank} of {world_size} failed:\n{value}"
            returned[rank] = value
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    return [returned[r] for r in range(world_size)]
