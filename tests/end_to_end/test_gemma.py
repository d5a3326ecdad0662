"""Gemma 3 270M as backbone: scaled embeddings, sliding windows, and a token before every text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf import MFConfig, fit_mf
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data import PrepareConfig, get_asset, load_prepared, prepare
from ccf_llm_hf.data.prepared import PreparedData
from ccf_llm_hf.inference.score_table import score_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma() -> Path:
    return get_asset("gemma-3-270m")


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedData, CFVectors]:
    folder = tmp_path_factory.mktemp("ml1m")
    prepare(PrepareConfig(source="ml-1m", out=str(folder)), summary=False)
    return load_prepared(folder), fit_mf(folder, MFConfig(folds=2))


def test_the_converted_model_speaks(gemma: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    model = AutoModelForCausalLM.from_pretrained(gemma)
    assert model.dtype == torch.float32
    text = "The capital of France is Paris. It is the largest city in the country, and it is famous"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert loss.exp() < 20  # 7.9 as converted from Q4_K_M
    assert tokenizer.decode(best).strip() == "for"


def test_the_tokenizer_keeps_titles_and_answers(
    gemma: Path, ratings: tuple[PreparedData, CFVectors]
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma)
    processor = CCFLLMProcessor(tokenizer, ["1"], ["Heat (1995)"], [])
    assert tokenizer.convert_ids_to_tokens(processor.answer_token_ids()) == ["▁Yes", "▁No"]
    assert processor.prompt.instruction()[0] == tokenizer.bos_token_id == 2
    for title in ratings[1].item_titles:
        assert tokenizer.decode(processor.prompt.tokens(f" {title}")) == f" {title}"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_scores_of_real_rows_equal_their_scores_alone(
    gemma: Path, ratings: tuple[PreparedData, CFVectors], attn: str
) -> None:
    data, cf = ratings
    processor = CCFLLMProcessor(
        AutoTokenizer.from_pretrained(gemma), cf.item_ids, cf.item_titles, cf.user_ids
    )
    torch.manual_seed(0)
    model = CCFLLMForCTR.from_backbone(
        str(gemma),
        processor,
        cf=cf,
        fusion="gate",
        item_text="static",  # reading the words of all titles takes minutes
        attn_implementation=attn,
    ).eval()
    assert 0.5 < model.config.slot_scale < 2  # of scaled embeddings; unscaled ones have 0.04
    users = data.splits["test"]["user_id"]
    owner = max(set(users), key=users.count)
    part = data.splits["test"].select([row for row, user in enumerate(users) if user == owner][:8])
    packed = score_table(model, processor, part, progress=False)["score"]
    alone = score_table(model, processor, part, max_candidates=1, progress=False)["score"]
    assert packed.std() > 1e-3
    np.testing.assert_allclose(packed, alone, atol=1e-4)
