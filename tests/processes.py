"""Two processes of torch.distributed with the environment that torchrun sets, from one import of torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

# Forks of a process that has imported linfast and run nothing: an import of torch takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["linfast.cli", "linfast.examples", "linfast.sampling", "torch._dynamo"])
_SECONDS = 300  # without a message from a process


def results_of_two(function: Callable[..., Any], *arguments: object) -> list[Any]:
    """The results of ``function(*arguments)`` in processes 0 and 1, which do not join a group by themselves."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, store.port, sender, function, arguments), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return [_received(receiver) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _received(receiver: Connection) -> Any:
    if not receiver.poll(_SECONDS):
        raise TimeoutError(f"a process said nothing for {_SECONDS} seconds")
    result, error = pickle.loads(receiver.recv_bytes())  # EOFError: the process has ended
    if error:
        raise AssertionError(error)
    return result


def _run(rank: int, port: int, sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    try:
        answer = (function(*arguments), "")
    except BaseException:
        answer = (None, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))  # by value: a tensor's shared memory would end with the process
