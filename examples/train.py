"""Train by a recipe.

One process (laptop CPU or one GPU):

    python examples/train.py --config examples/configs/ml1m.yaml

Any field of the recipe but `stages` can be overridden by a flag:

    python examples/train.py --config examples/configs/ml1m.yaml --output_dir runs/mine --seed 1

Several GPUs or machines, through accelerate:

    accelerate launch --config_file examples/accelerate_configs/two_gpus.yaml \
        examples/train.py --config examples/configs/ml1m.yaml

Two CPU processes (`accelerate launch --cpu` starts one; either of these starts two):

    torchrun --nproc_per_node 2 examples/train.py --config examples/configs/ml1m.yaml
    accelerate launch --config_file examples/accelerate_configs/two_cpu_processes.yaml \
        examples/train.py --config examples/configs/ml1m.yaml

Run the same command again to resume an interrupted run; finished stages are skipped.
"""

import json
import sys

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.run import run_recipe


def main() -> int:
    """Run the recipe named on the command line; 2 for bad input."""
    try:
        result = run_recipe(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
