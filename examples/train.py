"""Train a CCF-LLM as any model of transformers is trained, or by a recipe.

    ccf-llm prepare ml-1m --out data/ml1m
    ccf-llm fit-cf mf --data data/ml1m --out cf/ml1m-mf
    python examples/train.py --data_dir data/ml1m --cf_dir cf/ml1m-mf --output_dir runs/one-stage

Every flag of transformers' TrainingArguments works (--report_to, --push_to_hub, --bf16 ...), and
those of CTRTrainingArguments (--labels_per_step, --learning_rate_mapping ...). With --config a
recipe (docs/recipe.md) is run instead, stage by stage; run it again to resume:

    python examples/train.py --config examples/configs/ml1m.yaml --output_dir runs/mine --seed 1

Two GPUs, or two CPU processes; either works with and without a recipe:

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/train.py ...
    torchrun --nproc_per_node 2 examples/train.py ...
"""

import json
import sys
from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser, set_seed

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor, CFVectors, CTRTrainer, CTRTrainingArguments
from ccf_llm_hf.data import load_backbone_path, load_prepared
from ccf_llm_hf.training.run import run_recipe


@dataclass
class Inputs:
    """What to train on."""

    data_dir: str = field(metadata={"help": "Prepared data folder (`ccf-llm prepare`)."})
    cf_dir: str = field(metadata={"help": "CF vectors (`ccf-llm fit-cf`)."})
    backbone: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "Language model: asset name, local folder or Hub id."},
    )


def train(inputs: Inputs, args: CTRTrainingArguments) -> dict[str, float]:
    """One joint stage: LoRA, alignment networks and gate; returns the validation metrics."""
    data = load_prepared(inputs.data_dir)
    cf = CFVectors.load(inputs.cf_dir)
    backbone, revision = load_backbone_path(inputs.backbone)

    # The processor writes the hybrid prompt; the CF vectors decide which users and items there are.
    tokenizer = AutoTokenizer.from_pretrained(backbone, revision=revision)
    histories = data.protocol.get("histories", "likes")
    processor = CCFLLMProcessor(
        tokenizer,
        cf.item_ids,
        cf.item_titles,
        cf.user_ids,
        histories=histories,
        rating_scale=data.rating_scale(cf.rating_scale),
        field_values=cf.field_values,
    )
    set_seed(args.seed)
    model = CCFLLMForCTR.from_backbone(
        backbone,
        processor,
        revision=revision,
        backbone_name=inputs.backbone,
        cf=cf,
        fusion="gate",
        cf_logit=True,
    )
    trainer = CTRTrainer(
        model,
        args,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=processor,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        cf=cf,  # each training row sees vectors that were not fitted on it
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # AutoModel.from_pretrained(args.output_dir) loads it
    if args.push_to_hub:
        trainer.push_to_hub()
    print(f"the model is in {args.output_dir}", file=sys.stderr)
    return trainer.evaluate()


def main() -> int:
    """Train by flags or by a recipe; 2 for bad input."""
    try:
        if "--config" in sys.argv:
            result = run_recipe(sys.argv[1:])
        else:
            parser = HfArgumentParser([Inputs, CTRTrainingArguments])  # type: ignore[list-item]
            result = train(*parser.parse_args_into_dataclasses())
    except ValueError as error:  # InputError is one, and what the flags' parser raises
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
