"""What transformers' common tests ask of every model, over arms and backbones, and PEFT's of every
adapter.

Not asked, since a packed row has no such thing: hidden states, attentions and `inputs_embeds` as
arguments or outputs, generation, tied weights, pruned heads, and loading with weights left out,
which is refused.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from tiny import ARMS, BACKBONES, BuildModel
from transformers import AutoModel, AutoModelForSequenceClassification

from ccf_llm_hf import CCFLLMConfig, CCFLLMForCTR, CCFLLMProcessor

CALL = {
    "user": "u0",
    "history": ["i1", "i2", "i7"],
    "candidates": ["i0", "i3", "i7", "A new film (2024)"],
}
LABELS = [1, 0, 1, 0]
# An arm acts before the backbone, which knows none of it: every one of each, not every pair.
CASES = [*((arm, "llama") for arm in ARMS), *(("gate", kind) for kind in BACKBONES[1:])]
Made = tuple[CCFLLMForCTR, CCFLLMProcessor]


@pytest.fixture(params=CASES, ids="-".join)
def made(
    request: pytest.FixtureRequest, build: BuildModel, backbone_folder: Callable[..., Path]
) -> Made:
    """A model of an arm and a backbone, with its processor."""
    arm, kind = request.param
    model, processor = build(arm, backbone=kind, lora=True, cf_logit=True)
    model.config.backbone_name = str(backbone_folder(kind))
    return model, processor


def logits(model: Any, processor: CCFLLMProcessor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**processor(**CALL)).logits.float()


@pytest.mark.parametrize("form", ["full", "slim"])
def test_saved_equals_loaded_and_nothing_is_left_uninitialized(
    made: Made, tmp_path: Path, form: str
) -> None:
    model, processor = made
    model.save_pretrained(tmp_path, form=form)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, CCFLLMForCTR) and not loaded.training
        torch.testing.assert_close(
            logits(loaded, processor), logits(model, processor), atol=1e-5, rtol=0
        )
    again = CCFLLMForCTR.from_pretrained(tmp_path)
    left, right = (
        dict(one.named_buffers()) | dict(one.named_parameters()) for one in (loaded, again)
    )
    assert left.keys() == right.keys()  # those that no file holds, such as rotary ones, too
    for name, value in left.items():
        assert not value.is_meta
        assert torch.equal(value, right[name]), name


def test_every_weight_has_an_initialization(made: Made) -> None:
    """On the meta device there is none; what is put there instead must not be left. PyTorch's own
    layers initialize themselves."""
    config = made[0].config
    with torch.device("meta"):
        model = CCFLLMForCTR(copy.deepcopy(config))
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu")
    own = {
        name: value
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith("model.language_model.") and "alignment" not in name
    }
    for module in (*model.modules(), *own.values()):  # as loading builds it
        module._is_hf_initialized = False
    for value in own.values():
        value.data.fill_(torch.nan if value.is_floating_point() else 99)
    model.init_weights()
    for name, value in own.items():
        assert value.isfinite().all() and not (value == 99).any(), name


def test_a_config_round_trips(made: Made, tmp_path: Path) -> None:
    config = made[0].config
    config.save_pretrained(tmp_path)
    for again in (
        CCFLLMConfig.from_pretrained(tmp_path),
        CCFLLMConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
    ):
        assert type(again.text_config) is type(config.text_config)
        found, wanted = again.to_dict(), config.to_dict()
        for name in ("_name_or_path", "auto_map", "custom_pipelines", "architectures", "dtype"):
            found.pop(name, None), wanted.pop(name, None)
        assert found == wanted
    config.to_json_file(tmp_path / "one.json")
    CCFLLMConfig.from_json_file(tmp_path / "one.json").to_json_file(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def learn(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> dict[str, torch.Tensor]:
    """Gradients of one batch, by name."""
    torch.manual_seed(0)  # GPT-2 drops out
    model.zero_grad()
    model.train()(**processor(**CALL, labels=LABELS)).loss.backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(made: Made) -> None:
    model, processor = made
    expected = learn(model, processor)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing and model.language_model.is_gradient_checkpointing
    found = learn(model, processor)
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("form", ["full", "slim"])
def test_a_dtype_is_that_of_every_parameter_and_of_no_table(
    made: Made, tmp_path: Path, form: str
) -> None:
    model, processor = made
    model.save_pretrained(tmp_path / "saved", form=form)
    loaded = CCFLLMForCTR.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    for name, table in model.cf.named_buffers():
        assert torch.equal(dict(loaded.cf.named_buffers())[name], table), name
    torch.testing.assert_close(
        logits(loaded, processor), logits(model, processor), atol=0.3, rtol=0.1
    )
    loaded.save_pretrained(tmp_path / "again")
    again = CCFLLMForCTR.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert {
        weight.dtype
        for weight in CCFLLMForCTR.from_pretrained(
            tmp_path / "again", dtype=torch.float32
        ).parameters()
    } == {torch.float32}


def test_resized_embeddings_are_saved_and_change_no_score(made: Made, tmp_path: Path) -> None:
    model, processor = made
    expected = logits(model, processor)
    count = model.get_input_embeddings().weight.shape[0]
    resized = model.resize_token_embeddings(count + 8)
    assert resized is model.get_input_embeddings() and resized.num_embeddings == count + 8
    assert model.config.text_config.vocab_size == count + 8
    assert torch.equal(logits(model, processor), expected)
    model.save_pretrained(tmp_path, form="full")
    loaded = CCFLLMForCTR.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape[0] == count + 8
    torch.testing.assert_close(logits(loaded, processor), expected, atol=1e-5, rtol=0)


def test_parameters_are_counted_once(made: Made) -> None:
    model, _ = made
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    assert model.num_parameters() == sum(counts.values())
    words = model.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) <= sum(counts.values()) - words
    model.language_model.requires_grad_(False)
    body = sum(count for name, count in counts.items() if name.startswith("model.language_model."))
    assert model.num_parameters(only_trainable=True) == sum(counts.values()) - body


def test_scores_are_deterministic_and_copies_score_alike(made: Made) -> None:
    model, processor = made
    expected = logits(model, processor)
    assert torch.equal(logits(model, processor), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, processor), expected)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, processor), expected)
    as_tuple = model(**processor(**CALL, labels=LABELS), return_dict=False)
    loss, found = as_tuple
    assert loss.ndim == 0 and torch.equal(found, expected)


@pytest.mark.parametrize("form", ["full", "slim"])
def test_attention_can_be_chosen_at_load(made: Made, tmp_path: Path, form: str) -> None:
    model, processor = made
    model.save_pretrained(tmp_path, form=form)
    loaded = CCFLLMForCTR.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(
        logits(loaded, processor), logits(model, processor), atol=1e-4, rtol=0
    )


def test_shards_and_a_device_map_load(made: Made, tmp_path: Path) -> None:
    model, processor = made
    model.save_pretrained(tmp_path, form="full", max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = CCFLLMForCTR.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(
        logits(loaded, processor), logits(model, processor), atol=1e-5, rtol=0
    )


def targets(kind: str) -> list[str]:
    return ["c_attn"] if kind == "gpt2" else ["q_proj", "up_proj"]


ADAPTERS: dict[str, Callable[..., PeftConfig]] = {
    "LoRA": lambda names: LoraConfig(r=2, target_modules=names, init_lora_weights=False),
    "DoRA": lambda names: LoraConfig(
        r=2, target_modules=names, init_lora_weights=False, use_dora=True
    ),
    "LoHa": lambda names: LoHaConfig(r=2, target_modules=names, init_weights=False),
    "LoKr": lambda names: LoKrConfig(r=2, target_modules=names, init_weights=False),
    "OFT": lambda names: OFTConfig(
        oft_block_size=8, target_modules=names, init_weights=False, use_cayley_neumann=False
    ),
    "IA3": lambda names: IA3Config(
        target_modules=names, feedforward_modules=[], init_ia3_weights=False
    ),
    "VeRA": lambda names: VeraConfig(r=2, target_modules=names, init_weights=False),
    "AdaLoRA": lambda names: AdaLoraConfig(
        init_r=2, target_r=2, target_modules=names, total_step=10, init_lora_weights=False
    ),
}


OF_CONV1D = ("LoRA", "IA3", "VeRA", "AdaLoRA")  # what PEFT has for GPT-2's layers


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [*(("llama", name) for name in ADAPTERS), *(("gpt2", name) for name in OF_CONV1D)],
)
def test_every_adapter_of_peft_is_saved_by_peft_merged_or_refused(
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    adapter: str,
) -> None:
    model, processor = build(backbone=kind, cf_logit=True)
    model.config.backbone_name = str(backbone_folder(kind))
    fresh = copy.deepcopy(model)
    before = logits(model, processor)
    torch.manual_seed(5)
    tuned = get_peft_model(model, ADAPTERS[adapter](targets(kind)))
    after = logits(tuned, processor)
    assert (after - before).abs().max() > 1e-4
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned, processor), before)
    gradients = learn(tuned, processor)
    assert gradients and all("language_model" in name for name in gradients)
    tuned.eval().save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "peft")
    torch.testing.assert_close(logits(again, processor), after)
    for form in ("full", "slim"):  # with the adapter beside the weights
        if adapter == "LoRA":
            model.save_pretrained(tmp_path / form, form=form)
            found = logits(CCFLLMForCTR.from_pretrained(tmp_path / form), processor)
            torch.testing.assert_close(found, after, atol=1e-4, rtol=0)
        else:
            with pytest.raises(ValueError, match=r"learns by more than plain LoRA"):
                model.save_pretrained(tmp_path / form, form=form)
    merged = tuned.merge_and_unload()
    whole = logits(merged, processor)
    # The new film's words are read by the weights as they are now.
    torch.testing.assert_close(whole[:, :3], after[:, :3], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="form='full'"):
        merged.save_pretrained(tmp_path / "merged", form="slim")
    merged.save_pretrained(tmp_path / "merged", form="full")
    found = logits(CCFLLMForCTR.from_pretrained(tmp_path / "merged"), processor)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
