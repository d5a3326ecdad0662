"""Tiny backbones, a tiny tokenizer and a tiny catalog: whole-model invariants in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ARMS, TITLES, BuildModel, inject_lora, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors


@pytest.fixture(autouse=True)
def text_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where trainings keep what they read, in place of the user's cache."""
    folder = tmp_path / "text_states"
    monkeypatch.setattr("ccf_llm_hf.training.stage.TEXT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = [*TITLES, "Answer Yes or No. Liked: Yes No Yes No will they like the next one?"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def backbone_folder(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a tiny random causal language model of one family, with the tokenizer."""
    made: dict[str, Path] = {}

    def build(kind: str = "llama") -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
            for weight in model.parameters():
                if weight.ndim == 2:
                    torch.nn.init.normal_(weight, std=0.15)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return build


@pytest.fixture
def cf() -> CFVectors:
    """Two snapshots; the last item and the last user are unknown in both."""
    generator = torch.Generator().manual_seed(1)
    users, items, dim = 5, len(TITLES), 6
    user_known = torch.ones(2, users, dtype=torch.bool)
    item_known = torch.ones(2, items, dtype=torch.bool)
    user_known[:, -1] = False
    item_known[:, -1] = False
    item_known[0, 2] = False
    return CFVectors(
        user_ids=[f"u{row}" for row in range(users)],
        item_ids=[f"i{row}" for row in range(items)],
        item_titles=list(TITLES),
        user_vectors=torch.randn(2, users, dim, generator=generator),
        item_vectors=torch.randn(2, items, dim, generator=generator) * 3,
        user_known=user_known,
        item_known=item_known,
        default_user=torch.randn(2, dim, generator=generator),
        default_item=torch.randn(2, dim, generator=generator),
        offset=torch.randn(2, generator=generator),
        snapshot_times=torch.tensor([0, 100]),
        model_name="mf",
        metadata={},
    )


@pytest.fixture
def build(
    backbone_folder: Callable[[str], Path], cf: CFVectors, tokenizer: PreTrainedTokenizerFast
) -> BuildModel:
    """A tiny model and its processor for an arm, wording and backbone."""

    def make(
        arm: str = "gate",
        wording: str = "shared_prefix",
        backbone: str = "llama",
        lora: bool = False,
        attn: str | None = None,
        prompt: dict[str, object] | None = None,
        **settings: object,
    ) -> tuple[CCFLLMForCTR, CCFLLMProcessor]:
        fusion, form = ARMS[arm]
        processor = CCFLLMProcessor(
            tokenizer,
            cf.item_ids,
            cf.item_titles,
            cf.user_ids,
            wording=wording,
            history_format=form,
            candidate_format=form,
            field_values=cf.field_values,
            **(prompt or {}),
        )
        torch.manual_seed(2)
        model = CCFLLMForCTR.from_backbone(
            str(backbone_folder(backbone)),
            processor,
            backbone_name="tiny",
            fusion=fusion,
            cf=cf,
            attn_implementation=attn,
            **settings,
        )
        if lora:
            inject_lora(model)
        return model.eval(), processor

    return make
