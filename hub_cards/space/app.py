"""The Space: a CCF-LLM checkpoint of the Hub, loaded as any Hub user would, put on a page.

A plain `pipeline` with `trust_remote_code`, so that it needs the few packages of requirements.txt
and not ccf-llm-hf. The checkpoint is the first argument, or the environment
variable CCF_LLM_CHECKPOINT, or what checkpoint.json names; PORT says where it is served.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ccf_llm_space.recommender import Recommender
from ccf_llm_space.server import serve_page
from transformers import pipeline


def checkpoint() -> tuple[str, dict[str, Any]]:
    """The repository or folder, and the revision that its code and weights are pinned to."""
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("CCF_LLM_CHECKPOINT")
    if named:
        return named, {"revision": os.environ.get("CCF_LLM_REVISION")}
    settings = json.loads(Path(__file__).with_name("checkpoint.json").read_text(encoding="utf-8"))
    return settings["checkpoint"], {"revision": settings["revision"]}


def main() -> None:
    repo, options = checkpoint()
    task: Any = "ctr-ranking"  # of the checkpoint, not one of those that transformers lists
    ranker = pipeline(task, model=repo, trust_remote_code=True, **options)
    # On the Hub the container is asked from outside; elsewhere this machine is enough.
    host = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
    serve_page(Recommender(ranker), host, int(os.environ.get("PORT", "7860")))


if __name__ == "__main__":
    main()
