"""Scoring and ranking speed: the packed test split, and a user's candidates, against the baseline.

    python benchmarks/ranking.py

fp32, in turns, in one process. The fair baseline scores a seeded sample of the test rows and of the
candidates, since all of them would take it half an hour; speeds are per row. Also measured: the
backbone's linear layers in dynamic int8, with what that costs in AUC. Writes
`benchmarks/results/ranking.json` and `ranking.png` (latency against number of candidates).
"""

import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from baseline import FAIR, Baseline, write_samples
from workload import (
    FORMATS,
    PROMPTS,
    WINDOW,
    Workload,
    alternate,
    arguments,
    gemm_gflops,
    limit,
    line,
    spread,
    target,
    timed,
    write_results,
)

from ccf_llm_hf.data.grouping import Group, group_rows
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.evaluation.metrics import auc
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.inference.score_table import score_table
from ccf_llm_hf.modeling.ranking_ccf_llm import preselect

PEERS = {
    "wording": "question_last",
    "history_format": "title",
    "candidate_format": "title_slot",
    "history_window": (10, 1),
}
LATENCY = {"slot": 1.0, "title_slot": 2.5, "bare_title": 2.5}  # seconds for 100 candidates, at most
SIZES = (1, 10, 30, 100, 300, 1000)


def split_speed(work: Workload, sample: int, repeats: int) -> tuple[dict[str, Any], list[dict]]:
    """Rows per second over the test split; the baseline on `sample` of its rows."""
    test = work.data.splits["test"]
    rows = np.random.default_rng(0).choice(len(test), sample, replace=False)
    peers = work.processor(**PEERS)
    groups = group_rows(test.select(sorted(rows)), (10, 1), max_candidates=1)
    samples = write_samples(peers, groups)
    model = work.model(peers).eval()
    baseline = Baseline(model, work.backbone)
    processors = {form: work.processor(**PROMPTS[form]) for form in FORMATS}
    ways = {
        form: lambda p=processor: score_table(model, p, test, progress=False)
        for form, processor in processors.items()
    }
    baseline.score(samples[:4], FAIR)
    seconds = alternate(ways | {"baseline": lambda: baseline.score(samples, FAIR)}, repeats)
    counts = dict.fromkeys(ways, len(test)) | {"baseline": sample}
    rates = {n: spread([counts[n] / taken for taken in runs]) for n, runs in seconds.items()}
    summary = [
        target(
            f"test split scored, {text}, against question last, ten titles",
            12,
            rates[form]["median"] / rates["baseline"]["median"],
        )
        for form, text in FORMATS.items()
    ]
    return {"rows_per_second": rates, "baseline_rows": sample}, summary


def liked(work: Workload) -> tuple[str, list[str]]:
    """A test user with a full history window, and that history."""
    rows = work.data.splits["test"].to_pandas()
    row = rows[rows["history"].map(len) >= WINDOW[0]].iloc[0]
    return row["user_id"], list(row["history"])


def rank_seconds(ranker: CTRRanker, user: str, past: list[str], items: list[str]) -> float:
    """Seconds of one `rank` call."""
    return timed(lambda: ranker.rank(user=user, history=past, candidates=items, top_k=10))


def latency(work: Workload, calls: int) -> tuple[dict[str, Any], list[dict]]:
    """Seconds to rank one user's candidates, and that `rank` agrees with `predict`."""
    user, past = liked(work)
    catalog = [item for item in work.cf.item_ids if item not in set(past)]
    hundred = np.random.default_rng(1).choice(catalog, 100, replace=False).tolist()
    peers = work.processor(**PEERS)
    model = work.model(peers).eval()
    baseline = Baseline(model, work.backbone)
    few = Group(user, past[-10:], hundred[:20], [min(10, len(past))] * 20, [0] * 20)
    results: dict[str, Any] = {"baseline_candidates": 20, "rank": {}, "by_candidates": {}}
    summary: list[dict] = []
    slow = spread(
        [5 * timed(lambda: baseline.score(write_samples(peers, [few]), FAIR)) for _ in "12"]
    )
    results["baseline_100"] = slow
    for form, text in FORMATS.items():
        ranker = CTRRanker(model, work.processor(**PROMPTS[form]))
        rank_seconds(ranker, user, past, hundred)
        taken = [rank_seconds(ranker, user, past, hundred) for _ in range(calls)]
        results["rank"][form] = spread(taken) | {"p95": float(np.quantile(taken, 0.95))}
        p50 = results["rank"][form]["median"]
        summary += [
            limit(f"rank 100 candidates, {text}, p50", LATENCY[form], p50, "s"),
            target(f"rank 100 candidates, {text}, against the baseline", 10, slow["median"] / p50),
            line(
                f"rank equals predict, {text}",
                "at most 1e-4",
                *agreement(ranker, user, past, hundred),
            ),
        ]
        points = {}
        for size in SIZES:
            items = (catalog * 2)[:size]
            points[size] = min(rank_seconds(ranker, user, past, items) for _ in "12")
        results["by_candidates"][form] = points
        users = [user] * 8
        together = timed(lambda r=ranker, u=users: r.rank_many(u, [past] * 8, [hundred] * 8))
        results["rank"][form]["per_user_in_a_batch_of_8"] = together / 8
    results["by_candidates"]["baseline"] = {n: slow["median"] / 100 * n for n in SIZES if n <= 300}
    return results, summary


def agreement(ranker: CTRRanker, user: str, past: list[str], items: list[str]) -> Any:
    """Largest difference between `rank` and `predict`, its unit, and the verdict."""
    ranked = ranker.rank(user=user, history=past, candidates=items, top_k=len(items))
    found = {item.item_id: item.probability for item in ranked}
    pairs = [{"user": user, "history": past, "item": item} for item in items]
    alone = [float(ranker.predict([pair])[0]) for pair in pairs[:10]]
    worst = max(abs(found[item] - p) for item, p in zip(items, alone, strict=False))
    return worst, "probability", worst <= 1e-4


def int8(work: Workload, checkpoint: str, rows: int) -> dict[str, Any]:
    """Dynamic int8 and bfloat16 backbones beside fp32: rows per second and AUC on test rows."""
    from ccf_llm_hf.inference.checkpoint import load_checkpoint
    from ccf_llm_hf.inference.score_table import sample_users

    part = sample_users(work.data.splits["test"], rows)
    labels = np.array(part["label"])
    report: dict[str, Any] = {"rows": len(part)}
    for kind in ("fp32", "bf16", "int8"):
        model, processor = load_checkpoint(checkpoint, backbone=work.backbone)
        if kind == "bf16":
            model.language_model.to(torch.bfloat16)
        if kind == "int8":
            model.model.language_model = torch.ao.quantization.quantize_dynamic(
                model.language_model, {torch.nn.Linear}, dtype=torch.qint8
            )
        score_table(model, processor, part.select(range(20)), progress=False)
        started = time.perf_counter()
        scores = score_table(model, processor, part, progress=False)["score"]
        seconds = time.perf_counter() - started
        report[kind] = {
            "rows_per_second": round(len(part) / seconds, 1),
            "auc": float(auc(labels, scores)),
        }
        print(f"  {kind}: {report[kind]}", flush=True)
    return report


def in_words(run: str, users: int) -> tuple[dict[str, Any], list[dict]]:
    """Seconds to rank 100 books in words for readers who are new and who come back, all of them and
    a shortlist of 20, how many of the ten best the shortlist keeps, and what share of the machine's
    rate of matrix products the passes reach.

    Args:
        run: folder of a demo run, with `data` and `checkpoint-slim`.
        users: readers with histories of 48 lines or more.
    """
    data = load_prepared(f"{run}/data")
    ranker = CTRRanker.from_pretrained(f"{run}/checkpoint-slim")
    model, processor = ranker.model, ranker.processor
    long = [(user, past) for user, past in (data.lines() or {}).items() if len(past) >= 48]
    order = np.random.default_rng(0).permutation(len(long))[:users]
    seconds: dict[str, list[float]] = {}
    kept: list[float] = []
    for user, past in (long[place] for place in order):
        candidates = preselect(model, processor, user, past, 100)
        best: dict[str, list[Any]] = {}
        for name, shortlist in (("all", None), ("shortlist", 20)):
            asked = {"candidates": candidates, "top_k": 10, "shortlist": shortlist}
            ranker.prefixes.clear()
            for state in ("new", "cached"):
                started = time.perf_counter()
                best[name] = ranker.rank(user, past, **asked)
                taken = time.perf_counter() - started
                seconds.setdefault(f"{state}, {name}", []).append(taken)
        ids = [{item.item_id for item in items} for items in best.values()]
        kept.append(len(ids[0] & ids[1]) / len(ids[0]))
    results = {name: spread(taken) for name, taken in seconds.items()}
    summary = [
        limit(
            "rank 100 candidates in words, new reader, p50", 1.5, results["new, all"]["median"], "s"
        ),
        limit(
            "rank 100 candidates in words, cached reader, p50",
            0.5,
            results["cached, all"]["median"],
            "s",
        ),
        limit(
            "rank 100 candidates, shortlist of 20 in words, cached reader, p50",
            0.5,
            results["cached, shortlist"]["median"],
            "s",
        ),
        target("ten best, kept by a shortlist of 20", 0.9, float(np.mean(kept)), "of ten"),
    ]
    return results | {"gemm_gflops": gemm_gflops()}, summary


def retrieval(items: int, dim: int) -> tuple[dict[str, Any], list[dict]]:
    """Seconds to find the 100 best of many items for a user by an exact product, by precision."""
    vectors, user = torch.randn(items, dim), torch.randn(dim)
    results: dict[str, Any] = {"items": items, "dim": dim}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        table, one = vectors.to(dtype), user.to(dtype)
        taken = [timed(lambda t=table, u=one: (t @ u).float().topk(100)) for _ in range(15)]
        results[str(dtype).removeprefix("torch.")] = spread(taken)
    p50 = 1000 * results["float32"]["median"]
    return results, [limit(f"100 best of {items:,} items, exact product, p50", 50, p50, "ms")]


def plot(points: dict[str, dict[int, float]], path: str) -> None:
    """Latency against the number of candidates."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = FORMATS | {"baseline": "question last, ten titles (fair baseline)"}
    for name, label in names.items():
        axes.plot(list(points[name]), list(points[name].values()), marker="o", label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="candidates",
        ylabel="seconds to rank them for one user",
        title="SmolLM2-135M, fp32",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "ranking.json")
    parser.add_argument("--checkpoint", default="runs/bench/checkpoint-slim", help="for int8")
    parser.add_argument("--sample", type=int, default=150, help="test rows the baseline scores")
    parser.add_argument("--repeats", type=int, default=1, help="turns over the test split")
    parser.add_argument("--calls", type=int, default=15, help="rank calls of each kind")
    parser.add_argument("--books", default="", help="folder of a demo run, to rank books in words")
    options = parser.parse_args()
    found, summary_of_items = retrieval(1_000_000, 16)
    books, summary_of_books = in_words(options.books, 15) if options.books else ({}, [])
    work = Workload.load(options.data, options.cf)
    split, summary = split_speed(work, options.sample, options.repeats)
    ranking, more = latency(work, options.calls)
    plot(ranking["by_candidates"], options.out.replace(".json", ".png"))
    precision = int8(work, options.checkpoint, 1500)
    results = {
        "precision": "fp32",
        "test_split": split,
        "ranking": ranking,
        "backbone_precision": precision,
        "retrieval": found,
        "in_words": books,
        "summary": summary + more + summary_of_items + summary_of_books,
    }
    write_results(options.out, results)


if __name__ == "__main__":
    main()
