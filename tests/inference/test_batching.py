"""Requests that wait together are worked on together; none is lost, and none fails another."""

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from ccf_llm_hf.inference.batching import Batcher, Overloaded


class Work:
    """Doubles numbers, in the calls that it records, once `gate` is open; refuses `bad` ones."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad
        self.calls: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, requests: Sequence[int]) -> list[int]:
        self.gate.wait(10)
        self.calls.append(list(requests))
        for one in requests:
            if one in self.bad:
                raise ValueError(f"{one} is bad")
        return [2 * one for one in requests]


def batcher(work: Any, **settings: Any) -> Batcher:
    return Batcher(work, **({"max_waiting": 50, "max_batch": 4, "timeout": 10} | settings))


async def begin(batch: Batcher, *asked: tuple[Any, int]) -> list[asyncio.Task[Any]]:
    """Questions that have been put, the first of which is being worked on."""
    tasks = [asyncio.create_task(batch.ask(*asked[0]))]
    await asyncio.sleep(0.05)
    tasks += [asyncio.create_task(batch.ask(*one)) for one in asked[1:]]
    await asyncio.sleep(0.01)
    return tasks


def run(work: Work, *asked: tuple[Any, int], **settings: Any) -> list[Any]:
    """What each of the questions ended with."""

    async def all_answers() -> list[Any]:
        with batcher(work, **settings) as batch:
            tasks = await begin(batch, *asked)
            work.gate.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(all_answers())


def test_what_waits_together_is_one_call_of_a_bounded_size() -> None:
    work = Work()
    assert run(work, *(("a", n) for n in range(7))) == [0, 2, 4, 6, 8, 10, 12]
    assert work.calls == [[0], [1, 2, 3, 4], [5, 6]]


def test_only_equal_keys_go_together_and_the_longest_waiting_goes_first() -> None:
    work = Work()
    asked = [("a", 0), ("b", 1), (None, 2), ("a", 3), ("b", 4), (None, 5)]
    assert run(work, *asked) == [0, 2, 4, 6, 8, 10]
    assert work.calls == [[0], [1, 4], [2], [3], [5]]


def test_a_bad_request_fails_alone() -> None:
    work = Work(bad=(2,))
    answers = run(work, *(("a", n) for n in range(5)))
    assert [answer for answer in answers if isinstance(answer, int)] == [0, 2, 6, 8]
    assert str(answers[2]) == "2 is bad"


def test_an_answer_too_few_fails_and_the_thread_lives_on() -> None:
    async def two() -> list[Any]:
        with batcher(lambda requests: []) as batch:
            return [
                await asyncio.gather(batch.ask("a", 1), return_exceptions=True) for _ in range(2)
            ]

    for (answer,) in asyncio.run(two()):
        assert isinstance(answer, ValueError)


def test_a_full_queue_sheds_and_answers_what_it_took() -> None:
    work = Work()
    answers = run(work, *(("a", n) for n in range(9)), max_waiting=3)
    assert answers[:4] == [0, 2, 4, 6]
    assert len(answers[4:]) == 5
    for error in answers[4:]:
        assert isinstance(error, Overloaded) and error.retry_after >= 1


def test_retry_after_follows_the_pace() -> None:
    async def when_full() -> int:
        with batcher(lambda requests: time.sleep(0.4) or requests, max_waiting=5) as batch:
            await batch.ask(None, 0)
            tasks = await begin(batch, *((None, n) for n in range(6)))
            with pytest.raises(Overloaded) as refused:
                await batch.ask(None, 9)
            await asyncio.gather(*tasks)
            return refused.value.retry_after

    assert asyncio.run(when_full()) in (2, 3)


def test_what_is_not_answered_in_time_makes_room_and_is_never_worked_on() -> None:
    work = Work()

    async def late() -> Any:
        with batcher(work, max_waiting=1, timeout=0.05) as batch:
            tasks = await begin(batch, ("a", 0), ("a", 1))
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in ended] == [TimeoutError, TimeoutError]
            assert batch.waiting == 0
            work.gate.set()
            return await batch.ask("a", 2)

    assert asyncio.run(late()) == 4
    assert work.calls == [[0], [2]]


def test_leaving_answers_what_was_accepted() -> None:
    work = Work()

    async def leave() -> list[Any]:
        with batcher(work) as batch:
            tasks = await begin(batch, *(("a", n) for n in range(6)))
            threading.Timer(0.05, work.gate.set).start()
        return await asyncio.gather(*tasks)

    assert asyncio.run(leave()) == [0, 2, 4, 6, 8, 10]
