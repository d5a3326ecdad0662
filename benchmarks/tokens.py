"""What a label costs in tokens: answered lines against a history before its candidates.

    python benchmarks/tokens.py --data runs/bench/data-signed

Counted over whole groups of training rows, as a recipe packs them. The folder has to be prepared
with `--histories signed`. Writes `benchmarks/results/tokens.json`.
"""

import tempfile
from typing import Any

from transformers import AutoTokenizer
from workload import BACKBONE, arguments, limit, whole_groups, write_results

from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.arguments import CTRTrainingArguments
from ccf_llm_hf.training.trainer import group_training

# The windows that the recipes have.
LAYOUTS: dict[str, dict[str, Any]] = {
    "history first": {"history_window": (20, 16)},
    "answered": {"wording": "answered", "history_window": (48, 1)},
}
FORMS = {"slots": "slot", "titles": "title"}


def main() -> None:
    """Count, print and write."""
    parser = arguments(__doc__, "tokens.json")
    parser.add_argument("--labels", type=int, default=20_000, help="labels to count over")
    options = parser.parse_args()
    data = load_prepared(options.data)
    tokenizer = AutoTokenizer.from_pretrained(load_backbone_path(BACKBONE)[0])
    items = data.items
    tokens: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = CTRTrainingArguments(output_dir=folder)
        for form, name in FORMS.items():
            for layout, prompt in LAYOUTS.items():
                processor = CCFLLMProcessor(
                    tokenizer,
                    list(items["item_id"]),
                    list(items["title"]),
                    [],
                    histories="signed",
                    rating_scale=(3.5, 1.0),  # of five stars: more is a like
                    history_format=name,
                    candidate_format=name,
                    **prompt,
                )
                groups = group_training(data.splits["train"], processor, settings, None)
                groups = whole_groups(groups, options.labels)
                counted = sum(map(processor.count_tokens, groups))
                labels = sum(len(group.rows) for group in groups)
                tokens.setdefault(form, {})[layout] = round(counted / labels, 2)
    print(tokens)
    slots = tokens["slots"]
    name = "tokens a label in slots, answered lines against a history before its candidates"
    share = slots["answered"] / slots["history first"]
    results = {
        "data": data.protocol["name"],
        "tokens_per_label": tokens,
        "summary": [limit(name, 1, share, "times")],
    }
    write_results(options.out, results)


if __name__ == "__main__":
    main()
