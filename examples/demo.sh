#!/usr/bin/env bash
# From raw ratings to a ranked list, on MovieLens-1M: what `make demo` runs. Everything goes into runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/demo
step() { printf '\n== %s\n' "$*" >&2; }

step "1/6 prepare the ratings"
ccf-llm prepare ml-1m --out "$out/data"

step "2/6 fit matrix factorization, with and without biases"
ccf-llm fit-cf mf --data "$out/data" --out "$out/cf"
ccf-llm fit-cf mf --data "$out/data" --out "$out/cf-nobias" --no-use-biases --folds 2

step "3/6 train: LoRA on text, then the fusion"
ccf-llm train examples/configs/demo.yaml \
  --data_dir "$out/data" --cf_dir "$out/cf" --output_dir "$out"

step "4/6 score a sample of test users with the text-only stage, as a control"
ccf-llm evaluate "$out/stages/text/checkpoint" --data "$out/data" --split test \
  --sample-rows 1000 --name "text only" --out "$out/text_scores.parquet"

step "5/6 evaluate on the whole test split"
ccf-llm evaluate "$out/checkpoint" --data "$out/data" --split test --out "$out/scores.parquet" \
  --compare "MF=$out/cf" "MF without biases=$out/cf-nobias" "text only=$out/text_scores.parquet" \
  --average "MF,text only" --metrics-out "$out/metrics.json" --plot "$out/calibration.png" \
  --card "$out/checkpoint" "$out/checkpoint-slim"

step "6/6 ten recommendations for user 1120"
ccf-llm rank "$out/checkpoint-slim" --user 1120 --data "$out/data" --top-k 10

step "done: load it with AutoModel.from_pretrained(\"$out/checkpoint\")"
