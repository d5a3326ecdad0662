"""A checkpoint to the Hugging Face Hub and back.

    hf auth login
    python examples/push_and_load.py runs/demo/checkpoint-slim you/ccf-llm-bookcrossing

The arguments are a checkpoint and a repository. `push` looks for secrets and local paths, loads the
checkpoint in a process of its own and compares its scores before anything is sent; `ccf-llm push`
is the same on the command line.
"""

import sys

import torch
from transformers import AutoModel, AutoProcessor

from ccf_llm_hf.hub.push import push


def main(checkpoint: str, repo_id: str) -> None:
    push(checkpoint, repo_id, private=True)

    # From here on as anybody does who has transformers, but not this package.
    model = AutoModel.from_pretrained(repo_id, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True)
    liked, candidates = processor.item_titles[:2], processor.item_titles[2:12]
    batch = processor(history=liked, candidates=candidates)
    with torch.no_grad():
        chances = model.probabilities(model(**batch).logits[0])
    for chance, title in sorted(zip(chances.tolist(), candidates, strict=True), reverse=True):
        print(f"{chance:.3f}  {title}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
