"""`example.json`: calls with the logits they gave when the checkpoint was made.

Whoever publishes a checkpoint has them scored again, in a process that does not know this package.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.checkpoint_files import EXAMPLE_FILE
from ccf_llm_hf.hub.model_card import read_facts
from ccf_llm_hf.io import write_json
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

TOLERANCE = 1e-5
SCRIPT = Path(__file__).with_name("clean_process.py")


def record_example(folder: str | Path, model: CCFLLMForCTR, processor: CCFLLMProcessor) -> Path:
    """Write `example.json` into a checkpoint folder: the call that its card shows, one that reads
    the CF vectors of users and items, and the logits of both.

    What is recorded there already stays as it is, so that it can still contradict the weights.

    Args:
        folder: the checkpoint folder.
        model: the one that the folder holds.
        processor: its processor.

    Raises:
        InputError: a record or card.json is there, but damaged.
    """
    folder = Path(folder)
    calls = read_calls(folder)
    for call in (read_facts(folder).example, make_catalog_call(processor)):
        if call not in [known["inputs"] for known in calls]:
            calls.append({"inputs": call, "logits": _score(model, processor, call)})
    packages = ("torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return write_json(folder / EXAMPLE_FILE, {"calls": calls, "versions": versions})


def read_calls(folder: Path) -> list[dict[str, Any]]:
    """The recorded calls, each `{"inputs": ..., "logits": ...}`; none if there is no record.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / EXAMPLE_FILE
    if not file.is_file():
        return []
    try:
        calls = json.loads(file.read_text(encoding="utf-8"))["calls"]
        if all(isinstance(call["inputs"], dict) and call["logits"] for call in calls):
            return calls
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise InputError(f"{file} holds no recorded calls: delete it to have them recorded anew")


def make_catalog_call(processor: CCFLLMProcessor) -> dict[str, Any]:
    """A call by a known user, on items of the catalog and one that is not in it."""
    ids = processor.item_ids
    new = {"title": "A title outside the catalog"}
    call: dict[str, Any] = {"history": ids[:3], "candidates": [*ids[-3:], new]}
    return {"user": processor.user_ids[0], **call} if processor.user_ids else call


def check_in_clean_process(folder: Path, backbone: str | None, offline: bool) -> float:
    """Load a folder where this package cannot be imported, and score its recorded calls.

    Args:
        folder: a checkpoint folder with `example.json`.
        backbone: folder or name to attach to a slim checkpoint instead of the recorded one.
        offline: it must load without the network.

    Returns:
        The largest difference between a logit and the recorded one; at most `TOLERANCE`.

    Raises:
        InputError: it does not load there, or scores otherwise.
    """
    expected = read_calls(folder)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "logits.json"
        # Code cached from another checkpoint must not stand in for the folder's own.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(temporary) / "modules")}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        run = subprocess.run(
            # -P: not even a folder `ccf_llm_hf` or `torch` beside the script is found.
            [sys.executable, "-P", str(SCRIPT), str(folder), str(out), *filter(None, [backbone])],
            cwd=temporary,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise InputError(
                "the checkpoint does not load in a process without this package, so nobody else "
                f"could load it: {find_last_error(run.stderr)}"
            )
        scores = json.loads(out.read_text(encoding="utf-8"))
    return measure_difference(scores, expected)


def measure_recorded(folder: Path, model: CCFLLMForCTR, processor: CCFLLMProcessor) -> float | None:
    """As `check_in_clean_process`, of a folder's model and processor that are loaded already; None
    where no calls are recorded."""
    calls = read_calls(folder)
    if not calls:
        return None
    return measure_difference([_score(model, processor, call["inputs"]) for call in calls], calls)


def find_last_error(stderr: str) -> str:
    """The message that a traceback ends with, in one line."""
    lines = stderr.strip().splitlines()
    starts = [place for place, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exit)\b", line)]
    return " ".join(" ".join(lines[starts[-1] if starts else -1 :]).split())


def measure_difference(scores: list[Any], expected: list[dict[str, Any]]) -> float:
    """The largest difference between logits and recorded ones.

    Raises:
        InputError: it is above `TOLERANCE`, naming the call.
    """
    worst = 0.0
    for call, found in zip(expected, scores, strict=True):
        recorded, logits = torch.tensor(call["logits"]), torch.tensor(found)
        same_shape = recorded.shape == logits.shape
        difference = float((recorded - logits).abs().max()) if same_shape else float("inf")
        if not difference <= TOLERANCE:  # not a number is a difference too
            raise InputError(
                f"the example {json.dumps(call['inputs'], ensure_ascii=False)} "
                f"scores {logits.tolist()}, but {EXAMPLE_FILE} records {recorded.tolist()} "
                f"(difference {difference:.1e}, limit {TOLERANCE:.0e}): publish the weights that "
                f"were trained, or delete {EXAMPLE_FILE} to have it recorded anew"
            )
        worst = max(worst, difference)
    return worst


@torch.inference_mode()
def _score(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, call: dict[str, Any]
) -> list[list[float]]:
    # Said to be new, the card's title outside the catalog is not warned about as if it were a typo.
    known = processor.item_index.keys() | processor.title_index.keys()
    candidates = [
        item if isinstance(item, dict) or item in known else {"title": item}
        for item in call["candidates"]
    ]
    batch = processor(**call | {"candidates": candidates}, return_tensors="pt")
    was_training = model.training
    model.eval()
    try:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        return model(**inputs).logits.float().cpu().tolist()
    finally:
        model.train(was_training)
