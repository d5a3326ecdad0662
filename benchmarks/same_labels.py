"""Is the fast prompt as good? The packed slot-only prompt against the peers' prompt, trained on the
same labels.

    python benchmarks/same_labels.py                # the paper's gate alone
    python benchmarks/same_labels.py --cf-logit  # with the CF logit, as workload.yaml has it

Both train the same parameters (LoRA and a gate fusion) from the same start, for one epoch in the
same order of steps with the same optimizer, and are scored on the same validation users. Writes
`benchmarks/results/same_labels.json`, or `same_labels_cf_logit.json`.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from baseline import FAIR, Baseline, write_samples
from workload import LORA, WINDOW, Workload, arguments, line, whole_groups, write_results

from ccf_llm_hf.data.grouping import Group, group_rows
from ccf_llm_hf.evaluation.bootstrap import UserBootstrap, interval
from ccf_llm_hf.evaluation.metrics import auc, uauc
from ccf_llm_hf.modeling.ranking_ccf_llm import score
from ccf_llm_hf.training.collator import PackingCollator
from ccf_llm_hf.training.stage import freeze_in_bf16, uses_bf16
from ccf_llm_hf.training.trainer import sample_users

RATES = {"fusion": 1e-2, "gate": 2e-4, "lora": 1e-3}
LABELS_PER_STEP = 64


def optimizer(model: Any, lora: list[torch.nn.Parameter], steps: int) -> tuple[Any, Any]:
    """AdamW with the learning rates of workload.yaml, warmed up for a twentieth and then cosine."""
    gate = [parameter for _, parameter in model.gate_parameters()]
    known = {id(parameter) for parameter in gate}
    rest = [p for _, p in model.fusion_parameters() + model.head_parameters()]
    parts = {"fusion": [p for p in rest if id(p) not in known], "gate": gate, "lora": lora}
    adam = torch.optim.AdamW(
        [{"params": parts[name], "lr": rate} for name, rate in RATES.items()], weight_decay=0.0
    )
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


def train(
    steps: Sequence[Sequence[Group]],
    backward: Callable[[Sequence[Group]], None],
    model: Any,
    lora: list[torch.nn.Parameter],
) -> float:
    """One epoch; returns its seconds."""
    adam, schedule = optimizer(model, lora, len(steps))
    started = time.perf_counter()
    for number, groups in enumerate(steps, 1):
        backward(groups)
        torch.nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g["params"]], 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
        print(f"  step {number}/{len(steps)}, {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started


def cut_steps(groups: Sequence[Group], labels_per_step: int) -> list[list[Group]]:
    """Groups in order, about `labels_per_step` labels a step."""
    steps: list[list[Group]] = [[]]
    for group in groups:
        if sum(len(g.labels) for g in steps[-1]) >= labels_per_step:
            steps.append([])
        steps[-1].append(group)
    return steps


def packed(
    work: Workload, steps: Sequence[Sequence[Group]], chosen: set[int], cf_logit: bool
) -> dict[str, Any]:
    """Our prompt: logits of the validation rows and seconds of training."""
    processor = work.processor()
    model = work.model(processor, lora=True, cf_logit=cf_logit).train()
    if uses_bf16("auto"):
        freeze_in_bf16(model)
    collate = PackingCollator(processor)
    lora = [parameter for _, parameter in model.lora_parameters()]
    seconds = train(steps, lambda groups: model(**collate(groups)).loss.backward(), model, lora)
    groups = group_rows(work.data.splits["validation"], WINDOW)
    groups = [g for g in groups if set(g.rows) & chosen]
    scores = score(model, processor, groups, progress=True)
    rows = [row for group in groups for row in group.rows]
    return {"seconds": seconds, "logits": dict(zip(rows, np.concatenate(scores), strict=True))}


def peers(
    work: Workload, steps: Sequence[Sequence[Group]], chosen: set[int], cf_logit: bool
) -> dict[str, Any]:
    """The peers' prompt with ten titles, by the fair baseline."""
    processor = work.processor(
        wording="question_last",
        history_format="title",
        candidate_format="title_slot",
        history_window=(10, 1),
    )
    model = work.model(processor, lora=False, cf_logit=cf_logit).train()
    baseline = Baseline(model, work.backbone, LORA)
    lora = [p for name, p in baseline.causal.named_parameters() if ".lora_" in name]
    if uses_bf16("auto"):
        baseline.freeze_in_bf16()
    split = work.train_groups((10, 1), alone=True)
    by_row = {group.rows[0]: group for group in split}

    def backward(groups: Sequence[Group]) -> None:
        rows = [by_row[row] for group in groups for row in group.rows]
        baseline.train_pass(write_samples(processor, rows), FAIR)

    seconds = train(steps, backward, model, lora)
    alone = group_rows(work.data.splits["validation"], (10, 1), max_candidates=1)
    alone = [group for group in alone if group.rows[0] in chosen]
    scores = baseline.score(write_samples(processor, alone), FAIR)
    logits = {group.rows[0]: float(s) for group, s in zip(alone, scores, strict=True)}
    return {"seconds": seconds, "logits": logits}


def main() -> None:
    """Train both, score both, compare."""
    parser = arguments(__doc__, "same_labels.json")
    parser.add_argument("--labels", type=int, default=4000, help="training labels")
    parser.add_argument("--eval-labels", type=int, default=1000, help="validation labels")
    parser.add_argument("--cf-logit", action="store_true", help="add the CF model's own logit")
    options = parser.parse_args()
    if options.cf_logit and options.out == parser.get_default("out"):
        options.out = options.out.replace(".json", "_cf_logit.json")
    work = Workload.load(options.data, options.cf)
    steps = cut_steps(whole_groups(work.train_groups(), options.labels), LABELS_PER_STEP)
    validation = work.data.splits["validation"]
    sample = sample_users(group_rows(validation, WINDOW), options.eval_labels, seed=0)
    rows = sorted(row for group in sample for row in group.rows)
    labels, users = (np.array(validation.select(rows)[key]) for key in ("label", "user_id"))
    found = {name: way(work, steps, set(rows), options.cf_logit) for name, way in WAYS.items()}
    logits = {
        name: np.array([entry["logits"][row] for row in rows]) for name, entry in found.items()
    }
    quality = {
        name: {"auc": float(auc(labels, x)), "uauc": float(uauc(labels, x, users))}
        for name, x in logits.items()
    }
    draws = UserBootstrap(users)
    drawn = [draws.auc(labels, logits[name]) for name in WAYS]
    difference = quality["packed"]["auc"] - quality["peers"]["auc"]
    summary = [
        line(
            "validation AUC on the same labels, packed minus question last"
            + ", both with the CF logit" * options.cf_logit,
            "at least 0",
            difference,
            "AUC",
            difference >= 0,
        )
    ]
    results = {
        "labels": sum(len(g.labels) for step in steps for g in step),
        "validation_rows": len(rows),
        "precision": "bf16 backbone" if uses_bf16("auto") else "fp32",
        "validation": quality,
        "auc_difference": {"value": difference, "interval": interval(drawn[0] - drawn[1])},
        "train_seconds": {name: round(entry["seconds"], 1) for name, entry in found.items()},
        "summary": summary,
    }
    write_results(options.out, results)


WAYS = {"packed": packed, "peers": peers}

if __name__ == "__main__":
    main()
