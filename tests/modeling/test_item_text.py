"""What an item's words say: stored for the catalog, read on the fly for others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, TITLES, BuildModel
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.modeling import checkpoint_ccf_llm as checkpoint
from ccf_llm_hf.modeling import modeling_ccf_llm as modeling
from ccf_llm_hf.training.warm_start import load_trained_weights

CATALOG = torch.arange(len(TITLES))
ALIKE = {"atol": 2e-3, "rtol": 2e-3}  # stored vectors are in half precision
Backbones = Callable[..., Path]


def as_new(processor: CCFLLMProcessor, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids = [processor.text_ids(text) for text in texts]
    flat = [token for text in ids for token in text]
    return torch.tensor(flat, dtype=torch.long), torch.tensor([len(text) for text in ids])


def read_anew(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> Tensor:
    """Vectors of the catalog's texts as if no item of the catalog had them."""
    new = as_new(processor, processor.item_texts)
    return model.text_vectors(CATALOG + model.config.num_items, new)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_text_is_read_alike_alone_in_a_batch_and_in_training(
    build: BuildModel, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    model, processor = build(backbone=backbone)
    texts = processor.item_title_ids()
    together = model.model.read_texts(texts)
    assert together.shape == (len(texts), 32) and not together[TITLES.index("")].any()
    monkeypatch.setattr(modeling, "READ_TOKENS", 1)
    alone = model.train().model.read_texts(texts)
    assert model.language_model.training
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_states_are_the_mean_of_an_inner_layer_behind_the_first_token(build: BuildModel) -> None:
    model, processor = build(text_layer=2)
    (line,), ids = processor.text_prefix_ids(), processor.text_ids("Heat (1995)")
    with torch.no_grad():
        states = model.language_model(
            input_ids=torch.tensor([[line, *ids]]), output_hidden_states=True
        ).hidden_states[2]
    torch.testing.assert_close(
        model.model.read_texts([ids])[0], states[0, 1:].mean(0), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("form", ["injected", "slim", "full"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_stored_equals_read_on_the_fly_whatever_lora_has_learned(
    build: BuildModel, backbone_folder: Backbones, tmp_path: Path, backbone: str, form: str
) -> None:
    plain, processor = build(backbone=backbone)
    model, _ = build(backbone=backbone, lora=True)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        tuned = model.language_model(input_ids=ids).last_hidden_state
        assert (tuned - plain.language_model(input_ids=ids).last_hidden_state).abs().max() > 0.01
    if form != "injected":
        model.save_pretrained(tmp_path, form=form)
        place = {"backbone": str(backbone_folder(backbone))} if form == "slim" else {}
        model = AutoModel.from_pretrained(tmp_path, **place)
    stored = model.text_vectors(CATALOG)
    assert stored.std() > 0.1
    torch.testing.assert_close(stored, plain.text_vectors(CATALOG), atol=0, rtol=0)
    torch.testing.assert_close(read_anew(model, processor), stored, **ALIKE)
    with torch.no_grad():  # LoRA is on again
        found = model.language_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, tuned, atol=1e-5, rtol=1e-5)


def test_a_new_item_of_known_words_is_read_as_the_known_one(build: BuildModel) -> None:
    model, processor = build()
    batch = processor(user="u0", candidates=["A twin", "i7"])
    new = (batch["new_title_ids"], batch["new_title_lengths"])
    twin = as_new(processor, [TITLES[7]])
    words = model.model.item_words(torch.tensor([8, 7]), twin)
    torch.testing.assert_close(words[0], words[1], **ALIKE)
    other = model.model.item_words(torch.tensor([8]), new)
    assert (other[0] - words[1]).abs().max() > 0.01


def test_vectors_are_standardized_and_whitened(build: BuildModel) -> None:
    model, _ = build(text_dim=4)
    text = model.model.item_text
    generator = torch.Generator().manual_seed(6)
    spread = torch.linspace(3, 1, 32)  # of the directions that are kept, and the others
    states = torch.randn(500, 32, generator=generator) * spread
    states = states @ torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    scales = torch.ones(32)
    scales[0] = 1000.0  # a large dimension that says no more than the rest
    text.fit(states)
    plain = text.reduce(states)
    text.fit(states * scales + scales)
    vectors = text.reduce(states * scales + scales)
    torch.testing.assert_close(vectors.abs(), plain.abs(), atol=0.01, rtol=0)
    torch.testing.assert_close(vectors.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    covariance = vectors.mT @ vectors / len(vectors)
    torch.testing.assert_close(covariance, torch.eye(4), atol=1e-3, rtol=0)
    standard = (states - states.mean(0)) / states.std(0, correction=0)
    kept = torch.linalg.svdvals(standard)[:4].pow(2).sum()
    axes = torch.linalg.lstsq(vectors, standard).solution
    torch.testing.assert_close((vectors @ axes).pow(2).sum(), kept, atol=0, rtol=1e-4)


def test_directions_in_which_a_small_catalog_does_not_vary_say_nothing(build: BuildModel) -> None:
    model, processor = build()  # 7 items with words, 32 dimensions
    new = as_new(processor, ["Something else altogether", "A (2024)"])
    vectors = model.text_vectors(torch.tensor([8, 9]), new)
    assert vectors[:, :6].any(0).all() and not vectors[:, 6:].any()


def test_new_items_are_read_once_and_not_kept_without_end(
    build: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build()
    read: list[int] = []
    inner = modeling.read_texts

    def counting(reader: Any, layer: int, texts: list[list[int]], *rest: Any) -> Tensor:
        read.append(len(texts))
        return inner(reader, layer, texts, *rest)

    monkeypatch.setattr(modeling, "read_texts", counting)
    monkeypatch.setattr(modeling, "TEXTS_KEPT", 3)
    first = model.text_vectors(torch.tensor([8, 9, 10]), as_new(processor, ["A", "B", "A"]))
    assert read == [2] and torch.equal(first[0], first[2])
    again = model.text_vectors(torch.tensor([8, 9]), as_new(processor, ["B", "C"]))
    assert read == [2, 1] and torch.equal(again[0], first[1])
    model.text_vectors(torch.tensor([8]), as_new(processor, ["A", "B", "C", "D", "E"]))
    assert read == [2, 1, 2] and len(model.model._new_states) == 3


def test_a_killed_pass_over_the_catalog_goes_on_where_it_stopped(
    build: BuildModel,
    backbone_folder: Backbones,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = build()
    monkeypatch.setattr(checkpoint, "SHARD_ITEMS", 3)
    inner, read = modeling.CCFLLMModel.read_texts, []

    def reading(self: Any, texts: list[list[int]]) -> Tensor:
        if len(read) == 1 and not read[0]:
            raise KeyboardInterrupt
        read.append(len(texts))
        return inner(self, texts)

    monkeypatch.setattr(modeling.CCFLLMModel, "read_texts", reading)

    def make(processor: CCFLLMProcessor) -> CCFLLMForCTR:
        return CCFLLMForCTR.from_backbone(
            str(backbone_folder()), processor, text_cache=tmp_path / "cache"
        )

    read.append(0)  # the first shard's reading then raises
    with pytest.raises(KeyboardInterrupt):
        make(processor)
    read[:] = [1]
    assert not list(tmp_path.rglob("*.safetensors"))
    found = make(processor)
    assert read == [1, 3, 3, 2] and len(list(tmp_path.rglob("*.safetensors"))) == 3
    torch.testing.assert_close(found.text_vectors(CATALOG), model.text_vectors(CATALOG), **ALIKE)
    next(tmp_path.rglob("*.safetensors")).unlink()  # as a pass leaves it that was killed later
    again = make(processor)
    assert sum(read) == 9 + max(read[4:]) and len(read) == 5
    assert torch.equal(again.text_vectors(CATALOG), found.text_vectors(CATALOG))
    titles = [*TITLES[:-1], "Another title"]
    make(CCFLLMProcessor(processor.tokenizer, processor.item_ids, titles))
    assert read[5:] == [2]  # what was not read yet


@pytest.mark.parametrize("form", ["full", "slim"])
def test_checkpoints_of_before_are_static_and_score_as_ever(
    build: BuildModel, backbone_folder: Backbones, tmp_path: Path, form: str
) -> None:
    model, processor = build(item_text="static", lora=True)
    model.save_pretrained(tmp_path, form=form)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {
        name: value for name, value in config.items() if not name.startswith(("text_", "item_t"))
    }
    old["text_config"] = config["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    if form == "full":
        shutil.rmtree(tmp_path / "adapter")  # was written with slim ones only
    assert not (tmp_path / "text_vectors.safetensors").exists()
    place = {"backbone": str(backbone_folder())} if form == "slim" else {}
    loaded = AutoModel.from_pretrained(tmp_path, **place)
    assert loaded.config.item_text == "static" and loaded.model.text_alignment is None
    batch = processor(user="u0", history=["i1"], candidates=["i3", "A new one"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    words = model.get_input_embeddings()(torch.tensor(processor.text_ids(TITLES[3]))).mean(0)
    torch.testing.assert_close(loaded.text_vectors(torch.tensor([3]))[0], words)


def test_slots_without_words_are_not_read(build: BuildModel) -> None:
    for arm, kind in {"gate": "contextual", "cf_only": "static", "text_only": "static"}.items():
        assert build(arm)[0].config.item_text == kind
    assert build("cf_only", item_text="contextual")[0].text_vectors(CATALOG).shape == (8, 32)


def test_the_file_is_in_half_precision_and_of_its_own_training(
    build: BuildModel, backbone_folder: Backbones, tmp_path: Path
) -> None:
    for name, layer in (("one", 1), ("other", 2)):
        build(text_layer=layer, text_dim=16)[0].save_pretrained(tmp_path / name, form="slim")
    file = tmp_path / "one" / "text_vectors.safetensors"
    stored = load_file(file)["vectors"]
    assert stored.dtype == torch.float16 and stored.shape == (len(TITLES), 16)
    loaded = AutoModel.from_pretrained(
        tmp_path / "one", backbone=str(backbone_folder()), dtype=torch.bfloat16
    )
    assert torch.equal(loaded.model.item_text.vectors, stored)
    shutil.copy(tmp_path / "other" / "text_vectors.safetensors", file)
    with pytest.raises(OSError, match=r"text_vectors\.safetensors belongs to another catalog or"):
        AutoModel.from_pretrained(tmp_path / "one", backbone=str(backbone_folder()))
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({"vectors": stored}, file, metadata | {"ids_fingerprint": "another"})
    with pytest.raises(OSError, match=r"text_vectors\.safetensors belongs to another catalog or"):
        AutoModel.from_pretrained(tmp_path / "one", backbone=str(backbone_folder()))


def test_trained_weights_bring_the_space_that_they_were_trained_in(
    build: BuildModel, backbone_folder: Backbones, tmp_path: Path
) -> None:
    model, processor = build()
    with torch.no_grad():  # as another machine might compute it
        model.model.item_text.projection.mul_(-1)
        model.model.item_text.vectors.mul_(-1)
    model.save_pretrained(tmp_path, form="slim")
    other, _ = build()
    load_trained_weights(other, tmp_path)
    assert torch.equal(other.text_vectors(CATALOG), model.text_vectors(CATALOG))
    torch.testing.assert_close(read_anew(other, processor), other.text_vectors(CATALOG), **ALIKE)
    books = processor.with_catalog(["b0", "b1"], [TITLES[1], "A book"], [])
    make = CCFLLMForCTR.from_backbone
    with pytest.raises(ValueError, match=r"another space.*text_space_of"):
        load_trained_weights(make(str(backbone_folder()), books), tmp_path)
    third = make(str(backbone_folder()), books, text_space_of=tmp_path)
    torch.testing.assert_close(
        third.text_vectors(torch.tensor([0])), model.text_vectors(torch.tensor([1])), **ALIKE
    )
    load_trained_weights(third, tmp_path)
    fourth = make(str(backbone_folder()), books, text_layer=2, text_space_of=tmp_path)
    assert not torch.equal(fourth.model.item_text.mean, third.model.item_text.mean)


def test_another_catalog_is_read_into_the_old_space(build: BuildModel) -> None:
    model, processor = build(lora=True)
    before = model.text_vectors(torch.tensor([1]))
    model.replace_catalog(processor.with_catalog(["n0", "n1"], ["Fargo (1996)", TITLES[1]], []))
    assert model.config.num_items == 2
    torch.testing.assert_close(model.text_vectors(torch.tensor([1])), before, **ALIKE)


def test_only_the_alignment_learns_from_texts(build: BuildModel) -> None:
    model, processor = build()
    batch = processor(user="u0", history=["i1"], candidates=["i3", "New"], labels=[1, 0])
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.model.text_alignment.parameters())
    assert "model.text_alignment.up.weight" in dict(model.fusion_parameters())


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """Folder of a tiny random sentence encoder."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=24, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("form", ["full", "slim"])
def test_a_sentence_encoder_reads_in_the_backbones_place(
    build: BuildModel,
    backbone_folder: Backbones,
    encoder: Path,
    tmp_path: Path,
    form: str,
) -> None:
    reader = PreTrainedTokenizerFast.from_pretrained(encoder)
    model, processor = build(
        lora=True, prompt={"text_tokenizer": reader}, sentence_encoder=str(encoder)
    )
    assert model.config.text_width == 16 and model.config.text_layer == 2
    model.save_pretrained(tmp_path / "saved", form=form)
    processor.save_pretrained(tmp_path / "saved")
    place = {"backbone": str(backbone_folder())} if form == "slim" else {}
    loaded = AutoModel.from_pretrained(tmp_path / "saved", **place)
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    known = processor(user="u0", history=["i1"], candidates=["i3"])
    with torch.no_grad():  # without the encoder
        torch.testing.assert_close(loaded(**known).logits, model(**known).logits, atol=1e-5, rtol=0)
    assert not loaded.model._sentence_encoder
    torch.testing.assert_close(read_anew(loaded, again), model.text_vectors(CATALOG), **ALIKE)
    lonely = AutoModel.from_pretrained(tmp_path / "saved", **place)
    shutil.move(encoder, tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"sentence encoder .* cannot be loaded"):
        read_anew(lonely, again)
    assert any("text_alignment" in name for name, _ in lonely.fusion_parameters())
