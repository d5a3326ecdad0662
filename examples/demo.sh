#!/usr/bin/env bash
# From raw ratings to ranked lists, on Book-Crossing: what `make demo` runs. Everything goes into runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/demo
step() { printf '\n== %s\n' "$*" >&2; }

step "1/6 prepare the ratings"
ccf-llm prepare book-crossing --histories signed --max-history 64 --out "$out/data"

step "2/6 fit matrix factorization, without and with authors and publishers"
# The strengths are those that validation chooses; choosing them again takes ten minutes.
ccf-llm fit-cf mf --data "$out/data" --out "$out/cf-plain" --dim 16 --folds 2 \
  --l2-factors 8 --l2-user-bias 1 --l2-item-bias 2
ccf-llm fit-cf mf --data "$out/data" --out "$out/cf" --dim 16 --cross-fit users \
  --item-fields author publisher --field-scales 1 0.3 --tastes 2 0.5 \
  --l2-factors 7 --l2-user-bias 1 --l2-item-bias 8 --l2-value-factors 6 --l2-value-bias 2

step "3/6 train: a language model reads answered histories, beside the CF logit"
ccf-llm train examples/configs/demo.yaml \
  --data_dir "$out/data" --cf_dir "$out/cf" --output_dir "$out"

step "4/6 evaluate on a sample of test users"
ccf-llm evaluate "$out/checkpoint-slim" --data "$out/data" --split test --sample-rows 1800 \
  --out "$out/scores.parquet" --compare "MF=$out/cf-plain" "MF + fields=$out/cf" \
  --metrics-out "$out/metrics.json" --plot "$out/calibration.png" \
  --card "$out/checkpoint" "$out/checkpoint-slim"

step "5/6 ten books for a reader of Stephen King, and ten for a reader of Nora Roberts"
king=("Carrie" "Misery" "The Shining" "Pet Sematary" "Firestarter")
roberts=("Sea Swept" "Jewels of the Sun" "Montana Sky" "Carolina Moon" "The Villa")
ccf-llm rank "$out/checkpoint-slim" --history "${king[@]}" --max-per-topic 3 > "$out/king.txt"
ccf-llm rank "$out/checkpoint-slim" --history "${roberts[@]}" --max-per-topic 3 > "$out/roberts.txt"
pr -m -t -w 150 "$out/king.txt" "$out/roberts.txt"

step "6/6 a book that nobody has rated, beside six that many have, for the reader of Stephen King"
ccf-llm rank "$out/checkpoint-slim" --history "${king[@]}" --candidates \
  '{"title": "Billy Summers", "author": "Stephen King"}' "The Da Vinci Code" "Bridget Jones's Diary" \
  "The Firm" "Seabiscuit: An American Legend" "Wild Animus" "The Lovely Bones: A Novel"

step "done: load it with AutoModel.from_pretrained(\"$out/checkpoint\")"
