"""Runs the tasks of a report in this process or in several, which end when it does, however that
is.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import torch

from ..dispatch.registry import BackendError
from ..support.written import shown
from . import tasks

Task = tuple[str, tuple[Any, ...]]  # name of a function of `tasks`, its arguments after the sources
_sources = None  # of a worker process; an error, where it could not read them


def done(
    work: Sequence[Task], sources: tasks.Sources, jobs: int
) -> Iterator[tuple[Task, str | None]]:
    """Runs the tasks and gives (task, None or why it failed) as each one ends. BackendError: a
    process was killed.
    """
    if jobs == 1 or len(work) < 2:
        for task in work:
            yield task, _tried(sources, task)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        _start,
        (sources.config, sources.folder, threads),
    )
    try:
        running = {pool.submit(_work, task): task for task in work}
        for future in concurrent.futures.as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool:
        raise BackendError(
            "report: a process was killed, probably out of memory: "
            f"lower {shown('report', 'jobs')} ({jobs}); the same command goes on"
        ) from None
    finally:
        workers = list(
            (pool._processes or {}).values()
        )  # a worker in the middle of a training would be waited for
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()


def _tried(sources, task):
    name, arguments = task
    try:
        getattr(tasks, name)(sources, *arguments)
    except ValueError as error:
        return str(error)
    return None


def _start(config, folder, threads):
    global _sources
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _sources = tasks.Sources(config, folder)
    except (
        ValueError,
        OSError,
    ) as error:  # raised here, the pool would end as if it had been killed
        _sources = error


def _end_with_parent():
    """Waits for the end of the pipe that the parent process holds open while it lives: it ends also
    when that process is killed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers come here"
    wait([parent.sentinel])
    os._exit(1)


def _work(task):
    if isinstance(_sources, Exception):
        raise _sources
    return _tried(_sources, task)
