"""The load on the service, small: every request is accounted for, and what must hold is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import service

ROOT = Path(__file__).parents[2]


def test_every_request_of_the_load_is_accounted_for(tmp_path: Path) -> None:
    out = tmp_path / "service.json"
    command = [sys.executable, ROOT / "benchmarks" / "service.py", "--out", out]
    run = subprocess.run(
        [*command, "--requests", "40", "--seconds", "0.5"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert found["accepted"] + found["shed"] + found["lost"] == found["requests"] == 40
    assert found["lost"] == found["late"] == 0
    assert found["memory_mb"]["start"] > 100
    assert {"fastapi", "torch", "python"} < set(found["versions"]) and found["hardware"]
    holds = {entry["name"]: entry["holds"] for entry in found["summary"]}
    assert holds["requests lost"] and holds["exit code after SIGTERM"]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, None),
        ({"lost": 1}, "requests lost"),
        ({"late": 1}, "accepted requests answered too late"),
        ({"shed": 0}, "requests shed"),
        ({"offered_per_second": 20.0}, "load offered, against what the service can do"),
        ({"recovery_seconds": 9.0}, "recovery after the load"),
        ({"memory_mb": {"middle": 100, "end": 106}}, "memory at the end, against the middle"),
    ],
)
def test_what_must_hold(changed: dict, missed: str | None) -> None:
    good = {
        "capacity_per_second": 10.0,
        "offered_per_second": 40.0,
        "late": 0,
        "shed": 700,
        "lost": 0,
        "recovery_seconds": 0.2,
        "memory_mb": {"middle": 100, "end": 104},
    }
    summary = service.judge(good | changed, ended=0)
    assert [entry["name"] for entry in summary if not entry["holds"]] == [missed][: bool(missed)]
    assert service.judge(good, ended=-15)[-1]["holds"] is False


def test_the_committed_result_holds() -> None:
    found = json.loads((ROOT / "results" / "speed" / "service.json").read_text())
    assert found["requests"] >= 10_000
    assert all(entry["holds"] for entry in found["summary"])
