"""Write the README's figures from the committed results files, or check that they agree.

python benchmarks/readme.py --collect runs/demo   # copy a demo run's results, then write
python benchmarks/readme.py                       # write README.md from the results files
python benchmarks/readme.py --check               # exit code 1 when README.md is out of date
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ccf_llm_hf.hub.card_results import differences_table, methods_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DEMO = ROOT / "results" / "demo"
PACKING = ROOT / "benchmarks" / "results" / "packing.json"
BEGIN, END = "<!-- results: begin (benchmarks/readme.py) -->", "<!-- results: end -->"
COLLECTED = ("metrics.json", "training.json")
PLOTS = {"calibration.png": "calibration.png", "stages/fusion/curves.png": "curves.png"}


def collect(run: Path) -> None:
    """Copy what a demo run measured, and its plots, into the repository."""
    DEMO.mkdir(parents=True, exist_ok=True)
    for name in COLLECTED:
        shutil.copyfile(run / name, DEMO / name)
    for source, name in PLOTS.items():
        shutil.copyfile(run / source, DEMO / name)


def demo_section(metrics: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """The demo's table, its paired differences, and how it was made."""
    hardware, stages = training["hardware"], training["stages"]
    labels = sum(stage["train_labels"] for stage in stages.values())
    precision = "bfloat16" if hardware["bf16_backbone"] else "fp32"
    return [
        f"MovieLens-1M, the published protocol's test split: {metrics['rows']:,} rows, "
        f"{metrics['users']:,} users. One run of `make demo`: seed {training['recipe']['seed']}, "
        f"{labels:,} training labels over {len(stages)} stages, {training['minutes']:.0f} minutes "
        f"of training on {hardware['cpus']} CPU cores, backbone in {precision} "
        f"(torch {training['versions']['torch']}, transformers "
        f"{training['versions']['transformers']}). In brackets: 95 % intervals over users.",
        "",
        *methods_table(metrics["methods"]),
        "",
        f"{metrics['name']} minus the other method, paired over users:",
        "",
        *differences_table(metrics["differences"]),
        "",
        "![Training curves](results/demo/curves.png)",
        "",
        "![Calibration](results/demo/calibration.png)",
    ]


def packing_section(packing: dict[str, Any]) -> list[str]:
    """Packed against alone: exactness and speed."""
    equal, speed = packing["equality"], packing["training"]
    rates, tokens = speed["labels_per_second"], speed["tokens_per_label"]
    return [
        "",
        f"Packing is exact: over {equal['rows']:,} real test rows the largest difference between a "
        f"packed logit and the logit of the sample alone is {equal['largest']:.1e} (the logits' "
        f"standard deviation is {equal['logit_std']:.2f}). Training on the same "
        f"{speed['rows']:,} rows in one process runs at {rates['packed']:.1f} labels/s packed and "
        f"{rates['alone']:.1f} labels/s with one row a sample ({tokens['packed']:.1f} against "
        f"{tokens['alone']:.1f} tokens a label), {speed['speedup']:.1f} times as fast.",
    ]


def render() -> str:
    """README.md with its results section rewritten from the results files."""
    loaded = [json.loads((DEMO / name).read_text(encoding="utf-8")) for name in COLLECTED]
    lines = demo_section(*loaded)
    lines += packing_section(json.loads(PACKING.read_text(encoding="utf-8")))
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def main() -> None:
    """Collect, write or check."""
    parser = argparse.ArgumentParser(description="Write README figures from results files.")
    parser.add_argument("--collect", type=Path, help="folder of a finished demo run")
    parser.add_argument("--check", action="store_true", help="only compare; write nothing")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    text = render()
    if options.check:
        if text != README.read_text(encoding="utf-8"):
            sys.exit("README.md does not match its results files: run python benchmarks/readme.py")
        return
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
