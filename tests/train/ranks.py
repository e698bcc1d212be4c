"""Real ranks for tests: processes that join one gloo group and return what their function returns."""

import multiprocessing
import os
import socket
import traceback


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


def run_ranks(world_size, function, *args, timeout=900):
    """[function(*args) of each rank]; raises with the first failing rank's traceback. The function must be
    importable, and what it returns picklable without torch (numpy arrays, numbers)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mom_train.trainer"])
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
