"""Several ranks on this machine: processes that find torch imported already, joined by Gloo."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist


def run_ranks(work, world: int, *arguments, seconds: float = 110) -> list:
    """What `work(*arguments)` returns on each of `world` ranks; it finds its place with `find_place`.

    A rank that fails, or is not done after `seconds`, ends all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "safetensors.torch", "PIL.Image", "pytest"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, world, port, work, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    results, deadline = {}, time.monotonic() + seconds
    try:
        while len(results) < world:
            ready = wait([p for i, p in enumerate(pipes) if i not in results], deadline - time.monotonic())
            assert ready, f"ranks {sorted(set(range(world)) - set(results))} were not done after {seconds} s"
            for pipe in ready:
                good, value = pickle.loads(pipe.recv_bytes())  # EOFError: the rank was killed
                assert good, f"rank {pipes.index(pipe)}:\n{value}"
                results[pipes.index(pipe)] = value
    finally:
        for process in processes:
            if len(results) < world:
                process.kill()
            process.join(10)
    return [results[rank] for rank in range(world)]


def _rank(pipe, rank: int, world: int, port: int, work, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        answer = (True, work(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    if answer[0] and dist.is_initialized():
        dist.barrier()
    pipe.send_bytes(pickle.dumps(answer))  # by value; torch's own pickler would share memory that is gone too soon
    pipe.close()
    os._exit(0)
