"""Training speed: packed rows against the same content alone, the peers' prompt, and CoLLM's way.

    python benchmarks/training.py

Every way trains the same parameters (LoRA and fusion) of the same backbone on the same training
rows in fp32: forward and backward, in turns, in one process. Writes
`benchmarks/results/training.json` and `training.png` (labels per second against history length).
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from baseline import COLLM, FAIR, Baseline, Sample, Way, write_samples
from workload import (
    FORMATS,
    LORA,
    PROMPTS,
    WINDOW,
    Workload,
    alternate,
    arguments,
    gemm_gflops,
    spread,
    target,
    timed,
    whole_groups,
    write_results,
)

from ccf_llm_hf.data.grouping import Group
from ccf_llm_hf.modeling.ranking_ccf_llm import cut_by_budget
from ccf_llm_hf.training.collator import PackingCollator

TOKENS_PER_BATCH = 1024
TARGETS = {  # comparison -> at least this many times as fast: slot-only, with titles
    "the same content alone": {"slot": 10, "title_slot": 4, "bare_title": 4},
    "question last, ten titles": {"slot": 25, "title_slot": 10, "bare_title": 10},
    "CoLLM's way, ten titles": {"slot": 40, "title_slot": 15, "bare_title": 15},
}


def packed_pass(model: Any, processor: Any, groups: Sequence[Group]) -> None:
    """Forward and backward over the groups as the trainer packs them."""
    collate = PackingCollator(processor)
    lengths = [processor.count_tokens(group) for group in groups]
    labels = sum(len(group.labels) for group in groups)
    for batch in cut_by_budget(lengths, TOKENS_PER_BATCH):
        inputs = collate([groups[index] for index in batch])
        model(**inputs, num_items_in_batch=labels).loss.backward()
    model.zero_grad()


class Contest:
    """All ways to train on the same rows."""

    def __init__(self, work: Workload, labels: int) -> None:
        self.work = work
        self.groups = whole_groups(work.train_groups(), labels)
        self.rows = {row for group in self.groups for row in group.rows}
        self.processors = {form: work.processor(**PROMPTS[form]) for form in FORMATS}
        peers = work.processor(
            wording="question_last",
            history_format="title",
            candidate_format="title_slot",
            history_window=(10, 1),
        )
        self.samples = {
            f"alone, {form}": write_samples(processor, self.groups)
            for form, processor in self.processors.items()
        }
        alone = work.train_groups((10, 1), alone=True)
        self.samples["question last"] = write_samples(
            peers, [group for group in alone if group.rows[0] in self.rows]
        )
        self.model = work.model(self.processors["slot"], lora=True).train()
        self.baseline = Baseline(self.model, work.backbone, LORA)

    def ways(self) -> dict[str, Callable[[], None]]:
        """What is timed, by name."""
        ways: dict[str, Callable[[], None]] = {}
        for form, processor in self.processors.items():
            ways[f"packed, {form}"] = self._packed(processor)
        for name, samples in self.samples.items():
            ways[name] = self._baseline(samples, FAIR)
        ways["CoLLM's way"] = self._baseline(self.samples["question last"], COLLM)
        return ways

    def _packed(self, processor: Any) -> Callable[[], None]:
        return lambda: packed_pass(self.model, processor, self.groups)

    def _baseline(self, samples: list[Sample], way: Way) -> Callable[[], None]:
        return lambda: self.baseline.train_pass(samples, way)

    def warm_up(self) -> None:
        """A little of every way, so that no first call is timed."""
        packed_pass(self.model, self.processors["slot"], self.groups[:1])
        for way in (FAIR, COLLM):
            self.baseline.train_pass(self.samples["question last"][:4], way)

    def tokens(self) -> dict[str, float]:
        """Tokens per label of every way, without padding."""
        count = len(self.rows)
        tokens = {name: sum(len(s.ids) for s in rows) for name, rows in self.samples.items()}
        longest = max(len(s.ids) for s in self.samples["question last"])
        tokens["CoLLM's way"] = longest * count
        for form, processor in self.processors.items():
            lengths = [processor.count_tokens(group) for group in self.groups]
            batches = len(cut_by_budget(lengths, TOKENS_PER_BATCH))
            instruction = len(processor.prompt.instruction()) * batches
            tokens[f"packed, {form}"] = sum(lengths) + instruction
        return {name: round(total / count, 2) for name, total in tokens.items()}


def linear_flops(model: Any) -> float:
    """Multiplications and additions per token of one forward and one backward pass through the
    backbone's linear layers, whose own weights need no gradient."""
    layers = [m for m in model.language_model.layers.modules() if hasattr(m, "in_features")]
    return 4.0 * sum(layer.in_features * layer.out_features for layer in layers)


def efficiency(work: Workload, model: Any, repeats: int) -> dict[str, Any]:
    """Tokens per second of the packed way at full batches, against what matrix products allow."""
    processor = work.processor(candidate_format="slot")
    groups = whole_groups(work.train_groups(), 1000)
    tokens = sum(processor.count_tokens(group) for group in groups)
    rates, shares, gflops = [], [], []
    for _ in range(repeats):
        gflops.append(gemm_gflops())
        rates.append(tokens / timed(lambda: packed_pass(model, processor, groups)))
        shares.append(rates[-1] * linear_flops(model) / 1e9 / gflops[-1])
    return {
        "tokens_per_second": spread(rates),
        "gemm_gflops": spread(gflops),
        "gflop_per_token": linear_flops(model) / 1e9,
        "share_of_gemm": spread(shares),
    }


def where_time_goes(work: Workload, model: Any) -> dict[str, float]:
    """Shares of one packed pass by operation, largest first, for whoever wants the rest of it."""
    processor = work.processor(candidate_format="slot")
    groups = whole_groups(work.train_groups(), 500)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        packed_pass(model, processor, groups)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 4) for event in events[:14]}


def against_history(work: Workload, model: Any, rows: int) -> list[dict[str, Any]]:
    """Labels per second of ours and the fair baseline over lengths of history."""
    points = []
    for length in (5, 10, 20, 40, 80):
        entry: dict[str, Any] = {"history": length}
        groups = whole_groups(work.train_groups((length, 16)), rows)
        count = sum(len(group.labels) for group in groups)
        for form in FORMATS:
            processor = work.processor(**PROMPTS[form], history_window=(length, 16))
            packed_pass(model, processor, groups[:1])
            seconds = timed(lambda p=processor, g=groups: packed_pass(model, p, g))
            entry[f"packed, {form}"] = round(count / seconds, 2)
        peers = work.processor(
            wording="question_last",
            history_format="title",
            candidate_format="title_slot",
            history_window=(length, 1),
        )
        some = whole_groups(work.train_groups((length, 1), alone=True), 24)
        baseline = Baseline(model, work.backbone, LORA)
        samples = write_samples(peers, some)
        seconds = timed(lambda b=baseline, s=samples: b.train_pass(s, FAIR))
        entry["question last"] = round(len(samples) / seconds, 2)
        print("  " + str(entry), flush=True)
        points.append(entry)
    return points


def plot(points: list[dict[str, Any]], path: str) -> None:
    """Labels per second against history length."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = {
        **{f"packed, {form}": f"packed, {text}" for form, text in FORMATS.items()},
        "question last": "question last, titles (fair baseline)",
    }
    for name, label in names.items():
        x = [point["history"] for point in points]
        axes.plot(x, [point[name] for point in points], marker="o", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="history items",
        ylabel="training labels per second",
        title="SmolLM2-135M, forward and backward, fp32",
    )
    axes.set_xticks([p["history"] for p in points], [str(p["history"]) for p in points])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "training.json")
    parser.add_argument("--labels", type=int, default=128, help="training rows of the contest")
    parser.add_argument("--repeats", type=int, default=2, help="turns")
    options = parser.parse_args()
    work = Workload.load(options.data, options.cf)
    contest = Contest(work, options.labels)
    contest.warm_up()
    count = len(contest.rows)
    seconds = alternate(contest.ways(), options.repeats)
    rates = {name: spread([count / taken for taken in runs]) for name, runs in seconds.items()}
    speed = efficiency(work, contest.model, options.repeats)
    summary = []
    for comparison, targets in TARGETS.items():
        for form, wanted in targets.items():
            slow = {"the": f"alone, {form}", "question": "question last"}.get(
                comparison.split()[0], "CoLLM's way"
            )
            ratio = rates[f"packed, {form}"]["median"] / rates[slow]["median"]
            summary.append(
                target(f"training, {FORMATS[form]}, against {comparison}", wanted, ratio)
            )
    share = 100 * speed["share_of_gemm"]["median"]
    summary.append(target("training, share of the GEMM rate", 70, share, "%"))
    points = against_history(work, contest.model, options.labels)
    plot(points, options.out.replace(".json", ".png"))
    results = {
        "rows": count,
        "history_window": list(WINDOW),
        "precision": "fp32",
        "labels_per_second": rates,
        "tokens_per_label": contest.tokens(),
        "efficiency": speed,
        "where_time_goes": where_time_goes(work, contest.model),
        "against_history": points,
        "summary": summary,
    }
    write_results(options.out, results)


if __name__ == "__main__":
    main()
