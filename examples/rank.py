"""Rank the catalog for a new user, then ask why the winner won.

    python examples/rank.py runs/demo/checkpoint-slim "Carrie" "Misery"

The arguments are a checkpoint (folder or Hub repository) and the liked items, oldest first, as ids
or titles.
"""

import sys

from ccf_llm_hf import CTRRanker


def main(checkpoint: str, history: list[str]) -> None:
    ranker = CTRRanker.from_pretrained(checkpoint)
    ranked = ranker.rank(history=history, top_k=10)
    for place, item in enumerate(ranked, start=1):
        print(f"{place:>2}. {item.probability:.3f}  {item.title}")
    print()
    print(ranker.explain(history=history, item=ranked[0].title).as_text())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
