import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig

from ccf_llm_hf.training.warm_start import fills_slots_alike, read_lora

FILE = Path(__file__).parents[2] / "examples" / "train_sft.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_sft", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_sft"] = module
    spec.loader.exec_module(module)
    return module


def test_adapter_of_the_sft_trainer_starts_a_stage(
    example, backbone, data_dir, stage_run, tmp_path
):
    example.train(
        example.PromptArguments(str(data_dir), max_labels=32),
        SFTConfig(
            output_dir=str(tmp_path / "sft"),
            learning_rate=1e-2,
            num_train_epochs=1,
            save_strategy="no",
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        ModelConfig(
            model_name_or_path=str(backbone),
            use_peft=True,
            lora_r=4,
            lora_target_modules=["q_proj", "v_proj"],
        ),
    )
    assert read_lora(tmp_path / "sft")["r"] == 4

    run = stage_run(start=tmp_path / "sft", preset="text_only", prompt={"wording": "question_last"})
    processor = run.build_processor()
    model = run.build_model(processor).eval()
    assert not fills_slots_alike(tmp_path / "sft", model.config)
    up = [p for name, p in model.lora_parameters() if ".lora_B." in name]
    assert any(p.abs().max() > 0 for p in up)

    # The score is the language model's own preference of " Yes" over " No" after the same prompt.
    from peft import PeftModel

    causal = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(backbone), tmp_path / "sft"
    ).eval()
    batch = processor(history=["i1", "i2"], candidates=["i3"])
    yes, no = processor.answer_token_ids()
    with torch.no_grad():
        last = causal(batch["input_ids"]).logits[0, -1]
        expected = model.answer_scale * (last[yes] - last[no])
        torch.testing.assert_close(model(**batch).logits[0, 0], expected)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "sft")) <= processor.item_slot_token_id
