"""Score a prepared split and print the report: AUC, UAUC, intervals, slices, controls.

    python examples/evaluate_checkpoint.py runs/demo/checkpoint runs/demo/data test

The arguments are a checkpoint, a prepared folder (`ccf-llm prepare`) and a split. `ccf-llm
evaluate` does the same and keeps the scores. (Not called evaluate.py: next to it, that name would
hide the `evaluate` library from every example.)
"""

import sys

from ccf_llm_hf.data import load_prepared
from ccf_llm_hf.evaluation import evaluate_scores, format_report
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import score_table


def main(checkpoint: str, data_dir: str, split: str) -> None:
    model, processor = load_checkpoint(checkpoint)
    scores = score_table(model, processor, load_prepared(data_dir).splits[split])
    print(format_report(evaluate_scores(scores, data_dir, split)))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
