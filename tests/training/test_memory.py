import platform
from pathlib import Path

import pytest

from ccf_llm_hf.training.memory import HeapTrimmer, peak_memory


def resident() -> int:
    """Bytes that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_a_step_gives_back_what_lies_between_what_is_used() -> None:
    blocks = [bytearray(64 * 1024) for _ in range(2000)]
    last = blocks[-1]  # keeps the heap from shrinking by itself
    before = resident()
    del blocks
    HeapTrimmer().on_step_end(None, None, None)
    assert before - resident() > 80e6
    assert len(last) == 64 * 1024
    peak = peak_memory()
    assert peak is not None and before <= peak * 1e9 + 1e7
