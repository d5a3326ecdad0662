"""Load a checkpoint as someone does who never installed this package, and score its example.

Run as a script, by path and without arguments of its own package: `python clean_process.py FOLDER
OUT [BACKBONE]` writes the logits of the calls in FOLDER/example.json to OUT, as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any


def score_example(folder: str, backbone: str | None) -> list[Any]:
    """Logits of each recorded call, by the code and the weights of the folder alone."""
    import torch
    from transformers import AutoModel, AutoProcessor

    options = {"backbone": backbone} if backbone else {}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()
    calls = json.loads((Path(folder) / "example.json").read_text(encoding="utf-8"))["calls"]
    with torch.inference_mode():
        return [
            model(**processor(**call["inputs"], return_tensors="pt")).logits.tolist()
            for call in calls
        ]


if __name__ == "__main__":
    for package in ("ccf_llm_hf", "peft"):
        sys.modules[package] = None  # type: ignore[assignment]  # importing it fails
    scores = score_example(sys.argv[1], sys.argv[3] if len(sys.argv) > 3 else None)
    Path(sys.argv[2]).write_text(json.dumps(scores), encoding="utf-8")
