"""`ccf-llm merge`: a slim checkpoint and its backbone become a full one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BACKBONES, BuildModel
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.merge import merge_checkpoint
from ccf_llm_hf.hub.model_card import write_card

CALL = {"user": "u0", "history": ["i1", "i2"], "candidates": ["i0", "i7", "A new film (2024)"]}


@pytest.fixture
def slim(build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return save_slim(build, backbone_folder, tmp_path / "slim")


def save_slim(
    build: BuildModel, backbone_folder: Callable[..., Path], folder: Path, kind: str = "llama"
) -> Path:
    model, processor = build(backbone=kind, lora=True, cf_logit=True)
    model.config.backbone_name = str(backbone_folder(kind))
    model.save_pretrained(folder, form="slim")
    processor.save_pretrained(folder)
    write_card(folder)
    (folder / "plot.png").write_bytes(b"picture")
    return folder


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModel.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(**AutoProcessor.from_pretrained(folder)(**CALL)).logits


@pytest.mark.parametrize("kind", BACKBONES)
def test_merged_scores_as_slim(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    slim = save_slim(build, backbone_folder, tmp_path / "slim", kind)
    full = merge_checkpoint(str(slim), tmp_path / "deep" / "full")
    torch.testing.assert_close(logits(full), logits(slim), atol=1e-5, rtol=0)
    config = json.loads((full / "config.json").read_text())
    assert config["checkpoint_form"] == "full"
    assert config["backbone_fingerprint"], "which backbone it was stays on record"


def test_all_but_the_slim_weights_goes_along(slim: Path, tmp_path: Path) -> None:
    full = merge_checkpoint(str(slim), tmp_path / "full")
    names = {file.name for file in full.iterdir()}
    gone = {f"{name}.safetensors" for name in ("cf_embeddings", "text_vectors", "fusion")}
    assert names == {file.name for file in slim.iterdir()} - gone | {"model.safetensors"}
    for name in ("item_catalog.jsonl", "user_ids.jsonl", "processor_config.json", "plot.png"):
        assert (full / name).read_bytes() == (slim / name).read_bytes()
    card = (full / "README.md").read_text()
    assert "| Form | full: self-contained |" in card
    assert 'repo = "full"' in card and 'repo = "slim"' not in card
    assert "# slim\n" in card, "the model keeps its name"


def test_a_card_with_words_of_its_own_goes_along_as_it_stands(slim: Path, tmp_path: Path) -> None:
    (slim / "README.md").write_text("By hand.\n")
    full = merge_checkpoint(str(slim), tmp_path / "full")
    assert (full / "README.md").read_text() == "By hand.\n"
    (full / "README.md").unlink()
    assert "| Form | full: self-contained |" in write_card(full).read_text()


def test_another_backbone_is_attached_when_named(
    slim: Path, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(backbone_folder())
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    place = {"backbone": str(tmp_path / "other")}
    with pytest.warns(UserWarning, match="attached because backbone= names it"):
        full = merge_checkpoint(str(slim), tmp_path / "full", **place)
    with pytest.warns(UserWarning, match="attached because backbone= names it"):
        expected = logits(slim, **place)
    torch.testing.assert_close(logits(full), expected, atol=1e-5, rtol=0)


def test_an_empty_folder_is_filled_and_a_full_one_refused(slim: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    merge_checkpoint(str(slim), out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        merge_checkpoint(str(slim), out)
    assert before == {file: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(InputError, match="nothing to merge"):
        merge_checkpoint(str(out), tmp_path / "again")
    with pytest.raises(InputError, match=r"no config\.json"):
        merge_checkpoint(str(tmp_path), tmp_path / "again")


def test_nothing_is_left_of_a_merge_that_fails(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccf_llm_hf.hub import merge

    def fails(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(merge, "_copy_the_rest", fails)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space"):
        merge_checkpoint(str(slim), tmp_path / "full")
    assert set(tmp_path.iterdir()) == before


def test_the_command(slim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "full"
    assert cli.main(["merge", str(slim), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoint": str(slim), "out": str(out)}
    assert cli.main(["merge", str(slim), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} exists already")
    assert cli.main(["rank", str(out), "--history", "i0", "--candidates", "i1"]) == 0
