"""The threads that share the tasks of a pass."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import byref

import torch

from ppsf_dist.kernels.cpu.library import Library
from ppsf_dist.kernels.cpu.tables import Job, Pass, PlanTable

TASKS_FOR_EACH = 8
"""Waking a thread takes as long as a fraction of a task of 131,072 elements: with few of them one thread is faster."""


class _Pool:
    """Threads that are started when they are first needed; a child process that was forked starts its own."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def forget(self) -> None:
        """Of a parent process: its threads are not here."""
        self._executor, self._size = None, 0

    def get(self, threads: int) -> ThreadPoolExecutor:
        if self._executor is None or threads > self._size:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            self._executor = ThreadPoolExecutor(threads, thread_name_prefix="ppsf_dist")
            self._size = threads
        return self._executor


_POOL = _Pool()
if hasattr(os, "register_at_fork"):  # Not on Windows, which knows no fork.
    os.register_at_fork(after_in_child=_POOL.forget)


class Crew:
    """Runs the tasks of one plan, by as many threads as torch uses (``torch.get_num_threads()``).

    No task is done twice: an exception in here, a ctrl-C for instance, is a pause, and the same job goes on.
    """

    def __init__(self, library: Library, plan: PlanTable) -> None:
        self._library, self._plan = library, plan
        self._helping: list[Future[None]] = []

    def finish(self, what: Pass, job: Job) -> None:
        """Do what is left of a job, and wait for all of it."""
        tasks = job.last - job.next
        threads = min(torch.get_num_threads(), tasks // TASKS_FOR_EACH)
        if threads > 1:
            pool = _POOL.get(threads - 1)
            for _ in range(threads - 1):
                self._helping.append(pool.submit(self._library.run, byref(self._plan), what, byref(job)))
        self._library.run(byref(self._plan), what, byref(job))
        self.wait()

    def wait(self) -> None:
        """Until no other thread works on this plan."""
        while self._helping:
            self._helping[-1].result()
            self._helping.pop()
