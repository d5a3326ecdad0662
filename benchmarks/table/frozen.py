"""What histories that grow inside the test split change: MF folded in, on both kinds of histories.

    python benchmarks/table/frozen.py

Of MovieLens-1M's open track; the same CF table reads both. Writes results/ml-1m/frozen.json.
"""

import argparse
import sys
from pathlib import Path

from measure import PREPARED, Bench, folded_scores

from ccf_llm_hf.data.config import PrepareConfig
from ccf_llm_hf.data.prepare import prepare
from ccf_llm_hf.data.prepared import PROTOCOL_FILE, load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import UserBootstrap, auc, interval, uauc
from ccf_llm_hf.io import write_json

DATASET, FILE = "ml-1m", "frozen.json"


def compare(work: Path, offline: bool) -> dict:
    """AUC and UAUC of test on growing and on frozen histories, and their paired difference, with
    95 % intervals over users."""
    bench = Bench(DATASET, [], work, Path("results") / DATASET, offline)
    frozen = work / "data-open-frozen"
    if not (frozen / PROTOCOL_FILE).is_file():
        options = PREPARED["open"] | {"frozen_histories": True, "offline": offline}
        prepare(PrepareConfig(source=DATASET, out=str(frozen), **options))
    splits = {
        "growing": load_prepared(bench.data("open")).splits["test"],
        "frozen": load_prepared(frozen).splits["test"],
    }
    table = bench.cf("open", "mf")
    scores = {name: folded_scores(table, split)["score"] for name, split in splits.items()}
    rows = splits["growing"].select_columns(["user_id", "item_id", "label"]).to_pandas()
    if not rows.equals(splits["frozen"].select_columns(list(rows)).to_pandas()):
        raise InputError(f"{frozen} has other test rows than {bench.data('open')}: delete both")
    bootstrap, labels, users = UserBootstrap(rows["user_id"]), rows["label"], rows["user_id"]
    report: dict = {"rows": len(rows), "users": rows["user_id"].nunique()}
    drawn = {}
    for name, values in scores.items():
        drawn[name] = bootstrap.auc(labels, values), bootstrap.uauc(labels, values)
        report[name] = {
            "auc": auc(labels, values),
            "auc_ci": interval(drawn[name][0]),
            "uauc": uauc(labels, values, users),
            "uauc_ci": interval(drawn[name][1]),
        }
    report["difference"] = {  # frozen minus growing
        key: value
        for place, metric in enumerate(("auc", "uauc"))
        for key, value in (
            (metric, report["frozen"][metric] - report["growing"][metric]),
            (f"{metric}_ci", interval(drawn["frozen"][place] - drawn["growing"][place])),
        )
    }
    return report


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", default=f"runs/table/{DATASET}", help="as of run.py")
    parser.add_argument("--offline", action="store_true", help="do not use the network")
    options = parser.parse_args()
    try:
        report = compare(Path(options.work), options.offline)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(Path("results") / DATASET / FILE, report)
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
