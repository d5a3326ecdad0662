"""Requests that wait together go through the model together, in one thread."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

MEMORY = 0.9  # weight of the past in the seconds that a request takes


class Overloaded(Exception):
    """As many requests wait as may; in `retry_after` seconds these will have been answered."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting: try again in {retry_after} seconds")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Waiting:
    key: Hashable
    request: Any
    answer: Future[Any] = field(default_factory=Future)


class Batcher:
    """Gathers requests, and hands those that have waited for the same work over in one call.

    A context manager: its thread runs within, and leaving it answers what was accepted.

    Args:
        work: answers requests of one key, one answer each in their order. It is called in a thread
            of its own, one call at a time. Where it raises for several requests, it is called again
            on each half, so that an exception ends with the request that it belongs to.
        max_waiting: requests that may wait, besides those being worked on.
        max_batch: requests of one call, at most.
        timeout: seconds in which a request must have been answered.
        on_batch: called with the number of requests of each call.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_waiting: int,
        max_batch: int,
        timeout: float,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._work, self._on_batch = work, on_batch
        self.max_waiting, self.max_batch, self.timeout = max_waiting, max_batch, timeout
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._pace = 0.0  # seconds a request
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def __enter__(self) -> "Batcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    async def ask(self, key: Hashable, request: Any) -> Any:
        """The answer to a request.

        Args:
            key: requests of equal keys can be answered together. None: this one is answered alone.
            request: what `work` takes.

        Raises:
            Overloaded: `max_waiting` requests wait already.
            TimeoutError: there was no answer in time. If work on it has not begun, it will not.
            Exception: what `work` raised for this request.
        """
        one = _Waiting(key, request)
        with self._changed:
            if len(self._queue) >= self.max_waiting:
                seconds = math.ceil(len(self._queue) * self._pace)
                raise Overloaded(len(self._queue), max(1, seconds))
            self._queue.append(one)
            self._changed.notify()
        try:
            async with asyncio.timeout(self.timeout):
                return await asyncio.wrap_future(one.answer)
        finally:
            if one.answer.cancel():  # not when it is there, or being worked on
                self._forget(one)

    def _forget(self, one: _Waiting) -> None:
        with self._changed:
            if one in self._queue:
                self._queue.remove(one)

    def _run(self) -> None:
        while batch := self._take():
            started = time.monotonic()
            self._answer(batch)
            pace = (time.monotonic() - started) / len(batch)
            self._pace = MEMORY * self._pace + (1 - MEMORY) * pace if self._pace else pace

    def _take(self) -> list[_Waiting]:
        """The request that has waited longest, and those that can be answered with it; none when
        the batcher is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return []
            first = self._queue[0]
            batch = [first]
            if first.key is not None:
                batch = [one for one in self._queue if one.key == first.key][: self.max_batch]
            for one in batch:
                self._queue.remove(one)
            return batch

    def _answer(self, batch: list[_Waiting]) -> None:
        batch = [one for one in batch if one.answer.set_running_or_notify_cancel()]
        if batch:
            self._try(batch)

    def _try(self, batch: list[_Waiting]) -> None:
        self._on_batch(len(batch))
        try:
            answers = self._work([one.request for one in batch])
            both = list(zip(batch, answers, strict=True))
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            half = len(batch) // 2
            self._try(batch[:half])
            self._try(batch[half:])
            return
        for one, answer in both:
            one.answer.set_result(answer)
