"""Stage 1 with TRL: fine-tune the plain language model by LoRA on text-only CTR prompts.

    python examples/train_sft.py --data_dir data/ml1m --output_dir runs/sft \
        --model_name_or_path smollm2-135m-instruct --lora_r 8 --lora_alpha 16 \
        --lora_target_modules q_proj v_proj --learning_rate 5e-4 --num_train_epochs 1 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --max_labels 4000

One row per label in the papers' question-last wording; the loss is the language model's own, on the
answer token only. The output folder is a PEFT adapter: a recipe's stage starts from it with
`init_from: runs/sft`. All flags of TRL's `SFTConfig` and `ModelConfig` work.
"""

import sys
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

IGNORED_LABEL = -100


@dataclass
class PromptArguments:
    """What to write prompts from."""

    data_dir: str = field(metadata={"help": "Prepared data folder (`ccf-llm prepare ... --out`)."})
    history_length: int = field(default=10, metadata={"help": "Latest liked items to show."})
    max_labels: int = field(
        default=0, metadata={"help": "Train on a seeded sample of this many rows; 0: all."}
    )


def prompt_dataset(split: Dataset, processor: CCFLLMProcessor) -> Dataset:
    """Rows of a split as `input_ids` of prompt and answer, and `labels` on the answer token only.

    The processor makes the tokens: a CCF-LLM that takes the adapter then meets the same prompts.
    """
    yes, no = processor.answer_token_ids()

    def tokenize(row: dict) -> dict[str, list[int]]:
        batch = processor(history=row["history"], candidates=[row["item_id"]])
        prompt = batch["input_ids"][0].tolist()
        answer = yes if row["label"] else no
        return {
            "input_ids": [*prompt, answer],
            "labels": [IGNORED_LABEL] * len(prompt) + [answer],
        }

    return split.map(tokenize, remove_columns=split.column_names, desc="writing prompts")


def train(prompts: PromptArguments, config: SFTConfig, model_config: ModelConfig) -> None:
    """Write the adapter of a text-only LoRA fine-tuning to `config.output_dir`."""
    data = load_prepared(prompts.data_dir)
    folder, revision = load_backbone_path(str(model_config.model_name_or_path))
    processor = CCFLLMProcessor(
        AutoTokenizer.from_pretrained(folder, revision=revision),
        list(data.items["item_id"]),
        list(data.items["title"]),
        user_ids=[],
        wording="question_last",
        history_format="title",
        candidate_format="title",
        history_window=(prompts.history_length, 1),
    )
    rows = data.splits["train"]
    if prompts.max_labels:
        rows = rows.shuffle(seed=config.seed).select(range(min(prompts.max_labels, len(rows))))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=torch.float32),
        args=config,
        train_dataset=prompt_dataset(rows, processor),
        processing_class=AutoTokenizer.from_pretrained(folder, revision=revision),
        peft_config=get_peft_config(model_config),
    )
    trainer.train()
    trainer.save_model()


def main() -> int:
    """Parse the command line and train; 2 for bad input."""
    parser = TrlParser([PromptArguments, SFTConfig, ModelConfig])  # type: ignore[list-item]
    parser.set_defaults(
        model_name_or_path="smollm2-135m-instruct",
        use_peft=True,
        # A prompt that loses its end to truncation loses the question.
        max_length=None,
        # TRL's defaults are for large models on GPUs.
        use_cpu=not torch.accelerator.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    try:
        train(*parser.parse_args_and_config())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
