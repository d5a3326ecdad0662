"""Jobs in processes of their own: all done once, in an order that respects what they wait for."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from side_by_side import side_by_side

JOBS = {"text": (), "gate": (), "staged": ("text",), "average": ("text", "done before")}


def note(folder, name):
    """Leave marks of when the job began and ended; returns where it ran."""
    if name == "gate":
        time.sleep(0.5)
    (folder / name).write_text(" ".join(sorted(file.name for file in folder.iterdir())))
    return os.getpid(), torch.get_num_threads()


def test_every_job_runs_once_behind_what_it_waits_for(tmp_path):
    results = {}
    side_by_side(JOBS, partial(note, tmp_path), results.__setitem__, workers=2)
    assert results.keys() == JOBS.keys()
    for name, needs in JOBS.items():
        seen = (tmp_path / name).read_text().split()
        assert set(needs) & JOBS.keys() <= set(seen)
    processes = [process for process, _ in results.values()]
    assert len({*processes, os.getpid()}) == len(JOBS) + 1
    assert {threads for _, threads in results.values()} == {max(1, (os.cpu_count() or 1) // 2)}


def note_or_break(folder, name):
    """As `note`, but one job breaks, while another is under way however slowly both began."""
    if name == "broken":
        (folder / "broken").touch()
        raise ValueError("broken on purpose")
    if name == "gate":
        assert within(60, (folder / "broken").exists)
        time.sleep(2)
    return note(folder, name)


def test_what_a_job_raises_ends_the_run_behind_the_jobs_under_way(tmp_path):
    jobs = {"gate": (), "broken": (), "late": ("gate",)}
    results = {}
    with pytest.raises(ValueError, match="broken on purpose"):
        side_by_side(jobs, partial(note_or_break, tmp_path), results.__setitem__, workers=2)
    assert list(results) == ["gate"]
    assert {file.name for file in tmp_path.iterdir()} == {"gate", "broken"}


def last(folder, name):
    """Leave word of the process, then live a minute unless something ends it."""
    (folder / "begun").write_text(str(os.getpid()))
    (folder / "begun").rename(folder / name)
    time.sleep(60)


KILLED = """
import sys
from functools import partial
from pathlib import Path
from side_by_side import side_by_side
from tests.benchmarks.test_side_by_side import last
if __name__ == "__main__":
    side_by_side({"job": ()}, partial(last, Path(sys.argv[1])), print, workers=2)
"""


def test_jobs_end_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    here = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "killed.py", tmp_path], env=os.environ | here
    ) as run:
        try:
            assert within(60, (tmp_path / "job").exists)
        finally:
            run.kill()
    job = int((tmp_path / "job").read_text())
    assert within(30, lambda: not lives(job))


def lives(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # Where nobody collects orphans they stay listed as zombies.
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met
