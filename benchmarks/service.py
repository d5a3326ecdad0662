"""`ccf-llm serve --api` under four times the load that it can answer.

    python benchmarks/service.py

Starts the service in a process of its own on loopback, measures what it can do, sends requests at
four times that rate, and then sees whether it is as fast as before. Each ranks 50 candidates for a
history of 8 items. By default the model is a tiny random one: what is measured is the service,
which answers, sheds or loses requests, and not the model. Writes `results/speed/service.json`.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
from service_checkpoint import build_service_checkpoint
from workload import SEED, circumstances, limit, line, target, write_results

HISTORY, CANDIDATES = 8, 50
CLIENTS = 16  # that ask one request after another, when it is measured what the service can do
ALONE = 20  # requests one after another, before and after
WAIT = 120.0  # seconds after which the client takes a request for lost


@contextmanager
def serving(checkpoint: str, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a service, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "ccf_llm_hf.cli", "serve", checkpoint, "--api", "--port", port]
    environment = {name: value for name, value in os.environ.items() if name != "CCF_LLM_TOKEN"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, stdout=output, env=environment)
    try:
        while "the API is at" not in log.read_text(errors="replace"):
            if process.poll() is not None:
                raise SystemExit(f"the service did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def draw_bodies(checkpoint: str) -> Iterator[dict[str, Any]]:
    """Requests to rank items of a checkpoint's catalog, without end."""
    lines = (Path(checkpoint) / "item_catalog.jsonl").read_text(encoding="utf-8").splitlines()
    items = [{"id": json.loads(text)["id"]} for text in lines]
    draw = random.Random(SEED)
    while True:
        yield {
            "history": draw.choices(items, k=HISTORY),
            "candidates": draw.choices(items, k=CANDIDATES),
        }


class Load:
    """What became of requests: `answers` are (status, or an exception's name; seconds)."""

    def __init__(self, client: aiohttp.ClientSession, bodies: Iterator[dict[str, Any]]) -> None:
        self.client, self.bodies = client, bodies
        self.answers: list[tuple[int | str, float]] = []

    async def ask(self) -> int | str:
        """Send one request."""
        started = time.perf_counter()
        status: int | str
        try:
            async with self.client.post("/rank", json=next(self.bodies)) as answer:
                await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        self.answers.append((status, time.perf_counter() - started))
        return status

    async def memory(self) -> float:
        """Resident memory of the service in MB."""
        async with self.client.get("/metrics") as answer:
            text = await answer.text()
        found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
        assert found is not None
        return round(float(found[1]) / 1e6, 1)

    async def alone(self) -> float:
        """Median seconds of requests one after another."""
        self.answers.clear()
        for _ in range(ALONE):
            await self.ask()
        return median(seconds for _, seconds in self.answers)

    async def capacity(self, seconds: float) -> float:
        """Requests a second that are answered when a few clients wait for their answers."""
        self.answers.clear()
        started = time.perf_counter()

        async def ask_on() -> None:
            while time.perf_counter() < started + seconds:
                await self.ask()

        await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
        return len(self.answers) / (time.perf_counter() - started)

    async def flood(self, rate: float, requests: int) -> tuple[float, float]:
        """Send requests at a rate, whatever becomes of them; the rate that was reached, and the
        service's memory half way."""
        self.answers.clear()
        started = time.perf_counter()
        tasks, middle = [], 0.0
        for number in range(requests):
            ahead = started + number / rate - time.perf_counter()
            await asyncio.sleep(max(0.0, ahead))
            tasks.append(asyncio.create_task(self.ask()))
            if number == requests // 2:
                middle = await self.memory()
        reached = requests / (time.perf_counter() - started)
        await asyncio.gather(*tasks)
        return reached, middle

    async def recover(self, usual: float) -> float:
        """Seconds until a request takes no longer than twice the usual time."""
        started = time.perf_counter()
        while time.perf_counter() < started + WAIT:
            if await self.ask() == 200 and self.answers[-1][1] <= 2 * usual:
                return time.perf_counter() - started
        return WAIT


async def measure(address: str, checkpoint: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, of a service that runs."""
    async with aiohttp.ClientSession(
        address,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=WAIT),
    ) as client:
        load = Load(client, draw_bodies(checkpoint))
        await load.alone()
        before = await load.alone()
        capacity = await load.capacity(options.seconds)
        start = await load.memory()
        reached, middle = await load.flood(options.times * capacity, options.requests)
        statuses = Counter(str(status) for status, _ in load.answers)
        taken = [seconds for status, seconds in load.answers if status == 200]
        recovery = await load.recover(before)
        end, after = await load.memory(), await load.alone()
    centiles = quantiles(taken, n=100)
    answered = {status: statuses.pop(status, 0) for status in ("200", "429", "504")}
    return {
        "requests": options.requests,
        "capacity_per_second": round(capacity, 2),
        "offered_per_second": round(reached, 2),
        "accepted": answered["200"] + answered["504"],
        "late": answered["504"],
        "shed": answered["429"],
        "lost": sum(statuses.values()),
        "lost_as": dict(statuses),
        "accepted_seconds": {"p50": round(centiles[49], 4), "p99": round(centiles[98], 4)},
        "alone_seconds": {"before": round(before, 4), "after": round(after, 4)},
        "recovery_seconds": round(recovery, 4),
        "memory_mb": {"start": start, "middle": middle, "end": end},
    }


def judge(found: dict[str, Any], ended: int) -> list[dict[str, Any]]:
    """What must hold."""
    memory = found["memory_mb"]
    overload = found["offered_per_second"] / found["capacity_per_second"]
    return [
        target("load offered, against what the service can do", 3.5, overload),
        target("requests shed", 1, found["shed"], ""),
        line("requests lost", "0", found["lost"], "", not found["lost"]),
        line("accepted requests answered too late", "0", found["late"], "", not found["late"]),
        limit(
            "memory at the end, against the middle", 1.05, memory["end"] / memory["middle"], "times"
        ),
        limit("recovery after the load", 5, found["recovery_seconds"], "s"),
        line("exit code after SIGTERM", "0", ended, "", ended == 0),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", help="folder (default: a tiny random model)")
    parser.add_argument("--requests", type=int, default=10_000, help="in the load (default: 10000)")
    parser.add_argument("--times", type=float, default=4.0, help="what it can do (default: 4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure that (default: 10)")
    parser.add_argument("--out", default="results/speed/service.json", help="results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or str(build_service_checkpoint(Path(folder)))
        with serving(checkpoint, Path(folder) / "log") as (address, process):
            found = asyncio.run(measure(address, checkpoint, options))
            process.send_signal(signal.SIGTERM)
            ended = process.wait(60)
    packages = ("fastapi", "uvicorn", "prometheus_client", "aiohttp")
    about = circumstances()
    versions = about["versions"] | {name: version(name) for name in packages}
    results = {
        "versions": versions,
        "checkpoint": Path(options.checkpoint).name if options.checkpoint else "tiny and random",
        **found,
        "summary": judge(found, ended),
    }
    write_results(options.out, results)


if __name__ == "__main__":
    main()
