"""The script for a GPU, dry: what it does there on tiny shapes, and no package but torch's."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_dry_run_holds_its_invariants_and_measures_everything(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--dry", "--out", out],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["dry"] and found["gemm_tflops"] >= 0
    packed = found["invariants"]["packed is alone"]
    assert len(packed) == 16 and all(one["holds"] for one in packed.values())
    attention = found["invariants"]["attention"]
    for way in ("dense sdpa", "tiles", "flex", "varlen"):
        assert attention[f"{way} float32"]["holds"] and attention[f"{way} bfloat16"]["holds"]
    assert found["invariants"]["a step is the CPU's"]["holds"]
    for name in ("135M", "1.5B"):
        speed = found["speed"][name]
        assert speed["training"]["labels_per_second"] > 0 and speed["ranking"]["p50_ms"] > 0
        assert speed["scoring"]["rows_per_second"] > 0 and speed["peak_memory_gb"] > 0


def test_it_needs_torch_and_transformers_alone():
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    script = str(ROOT / "benchmarks" / "gpu.py")
    done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "modeling" in loaded and not loaded & {"ccf_llm_hf", "datasets", "trl", "ray"}
