"""Every file of a checkpoint, damaged in every way: one sentence that names it, or no harm done."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from tiny import inject_lora

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.ranker import CTRRanker

WRONG: tuple[Any, ...] = (None, [], {"a": 1}, "x", -1, float("nan"))
FULL = (
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "item_catalog.jsonl",
    "user_ids.jsonl",
    "field_values.jsonl",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "model.safetensors",
)
SLIM = (*FULL[:-1], "cf_embeddings.safetensors", "text_vectors.safetensors", "fusion.safetensors")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with LoRA and fields in both forms."""
    folder = tmp_path_factory.mktemp("whole")
    model = CCFLLMForCTR.from_pretrained(checkpoint)
    processor = CCFLLMProcessor.from_pretrained(checkpoint)
    inject_lora(model)
    for form in ("full", "slim"):
        model.save_pretrained(folder / form, form=form)
        processor.save_pretrained(folder / form)
    return folder


def damages(file: Path) -> Iterator[bytes | None]:
    """Contents in the place of a file's own; None: it is missing."""
    content = file.read_bytes()
    yield from (None, b"", content[: len(content) // 2], b"\xff" + content[1:], b"\0" * 64)
    if file.suffix == ".safetensors":
        yield from damaged_tensors(file)
        return
    yield from (b"[]", b"3", b"{}\n", b"[" * 5000, content.replace(b"e", b"\xe9", 1))
    if file.name == "tokenizer.json":
        return
    rows = content.splitlines(keepends=True) if file.suffix == ".jsonl" else [content]
    row = json.loads(rows[0])
    for place, key in enumerate(row):
        for value in (WRONG[place % len(WRONG)], WRONG[(place + 3) % len(WRONG)]):
            yield b"".join([json.dumps(row | {key: value}).encode() + b"\n", *rows[1:]])


def damaged_tensors(file: Path) -> Iterator[bytes]:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = min(tensors)
    others = {key: value for key, value in tensors.items() if key != name}
    yield save(others, metadata)
    yield save(others | {name: torch.zeros(3, 5, 7)}, metadata)
    number = next(key for key, value in tensors.items() if value.is_floating_point())
    yield save(tensors | {number: torch.full_like(tensors[number], torch.nan)}, metadata)


@pytest.mark.parametrize(
    ("form", "name"), [("full", name) for name in FULL] + [("slim", name) for name in SLIM]
)
def test_a_damaged_file_is_named_or_does_no_harm(
    whole: Path,
    backbone_folder: Callable[[str], Path],
    tmp_path: Path,
    form: str,
    name: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / form, folder, ignore=shutil.ignore_patterns("*.py"))
    backbone = str(backbone_folder("llama")) if form == "slim" else None
    refused = 0
    for content in damages(whole / form / name):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
        try:
            ranker = CTRRanker.from_pretrained(str(folder), backbone=backbone)
            assert ranker.rank(history=["1"], candidates=["2", "A new film"])
        except InputError as error:
            refused += 1
            # Without the record of its LoRA a full form says what it cannot do any more.
            lora = (form, Path(name).parent.name) == ("full", "adapter")
            lost = lora and "load its slim form" in str(error)
            named = lost or str(folder) in str(error)
            assert named and "\n" not in str(error), (content, error)
    assert refused or (form, Path(name).parent.name) == ("full", "adapter")
