"""Several jobs at once, each in a process of its own with its share of the cores.

Loading, fitting and reports use one core only, and threads of one pass wait for one another.
"""

import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from typing import TypeVar

import torch

Result = TypeVar("Result")


def side_by_side(
    jobs: Mapping[str, Collection[str]],
    work: Callable[[str], Result],
    finished: Callable[[str, Result], None],
    workers: int,
) -> None:
    """Run jobs, `workers` at a time, in their order as far as what they wait for allows.

    Jobs end with this process, however it ends.

    Args:
        jobs: names, and the names that each waits for; those that are no jobs count as done.
        work: does the job of a name; both go to another process, so they must pickle.
        finished: called here with a job's name and result as soon as it ends.
        workers: processes at a time.

    Raises:
        Exception: what a job raised, the first if several did; no further one is started, and those
            under way end first, with their results.
    """
    waiting, running = dict(jobs), dict[Future[Result], str]()
    failure: BaseException | None = None
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _begin, (workers,), max_tasks_per_child=1
    ) as pool:
        while waiting or running:
            unfinished = waiting.keys() | set(running.values())
            ready = [name for name, needs in waiting.items() if not unfinished & set(needs)]
            for name in ready[: workers - len(running)]:
                running[pool.submit(work, name)] = name
                del waiting[name]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if problem := future.exception():
                    failure = failure or problem
                    waiting.clear()
                else:
                    finished(name, future.result())
    if failure:
        raise failure


def _begin(workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent would leave its jobs to write into folders that the next run works in."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
