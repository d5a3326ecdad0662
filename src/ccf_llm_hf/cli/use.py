"""The commands that use a model: `evaluate`, `rank`, `score` and `explain`."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccf_llm_hf.cli.command import (
    Command,
    Output,
    checkpoint_arguments,
    existing_folder,
)
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import check_checkpoint
from ccf_llm_hf.io import check_writable, write_json

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from ccf_llm_hf.data.rows import Rows
    from ccf_llm_hf.inference.ranker import CTRRanker

SPLITS = ("train", "validation", "test")
CF_ALONE = "CF logit alone"


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument("--data", required=True, help="prepared folder (see ccf-llm prepare)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: test)")
    parser.add_argument("--out", required=True, help="parquet file to write the scores to")
    parser.add_argument(
        "--sample-rows",
        type=int,
        default=0,
        help="score a seeded sample of whole users with about this many rows; 0: the whole split",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="other methods to compare with: scores written by --out, or folders of fit-cf",
    )
    parser.add_argument(
        "--average",
        nargs="+",
        default=[],
        metavar="NAME,NAME",
        help="pairs of these methods whose averaged scores are a further method",
    )
    parser.add_argument("--name", default="CCF-LLM", help="of this method (default: CCF-LLM)")
    parser.add_argument("--metrics-out", help="JSON file for the whole report")
    parser.add_argument("--plot", help="PNG file for the calibration plot")
    parser.add_argument(
        "--card",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="checkpoint folders whose README.md shall show these results",
    )
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=2048,
        help="tokens scored at once; lower it when memory is short (default: 2048)",
    )


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> Output:
    data = existing_folder(arguments.data, "--data", "ccf-llm prepare")
    paths = dict(_name_and_path(text) for text in arguments.compare)
    averages = [_pair(text, {arguments.name, *paths}) for text in arguments.average]
    _check_outputs(arguments)
    check_checkpoint(arguments.checkpoint)
    from ccf_llm_hf.data.prepared import load_prepared
    from ccf_llm_hf.evaluation import evaluate_scores, format_report, plot_calibration
    from ccf_llm_hf.inference.checkpoint import load_checkpoint
    from ccf_llm_hf.inference.gate import gate_report
    from ccf_llm_hf.inference.score_table import (
        sample_users,
        score_cf_table,
        score_table,
        write_scores,
    )

    prepared = load_prepared(data)
    split: Dataset | Rows = prepared.rows(arguments.split)
    if arguments.sample_rows:
        split = sample_users(prepared.splits[arguments.split], arguments.sample_rows)
    compare = {name: _load_scores(path, data, arguments.split) for name, path in paths.items()}
    model, processor = load_checkpoint(arguments.checkpoint, backbone=arguments.backbone)
    scores = score_table(
        model,
        processor,
        split,
        lines=prepared.lines(),
        tokens_per_batch=arguments.tokens_per_batch,
    )
    write_scores(scores, arguments.out)
    if model.config.cf_logit:
        compare[CF_ALONE] = score_cf_table(model, processor, split, lines=prepared.lines())
    report = evaluate_scores(
        scores,
        data,
        arguments.split,
        compare,
        name=arguments.name,
        averages=averages,
        sample=bool(arguments.sample_rows),
    )
    report["gate"] = gate_report(model, processor, data)
    if arguments.metrics_out:
        write_json(arguments.metrics_out, report)
    if arguments.plot:
        plot_calibration(scores, arguments.plot, name=arguments.name)
    for folder in arguments.card:
        from ccf_llm_hf.hub.model_card import describe_run

        describe_run(folder, data, report)
    return Output(format_report(report), report)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is scored, places where the results could not be written."""
    for flag in ("out", "metrics_out", "plot"):
        path = getattr(arguments, flag)
        if path and Path(path).is_dir():
            raise InputError(f"--{flag.replace('_', '-')} {path} is a folder: name a file in it")
        if path:
            check_writable(path)
    if arguments.plot and Path(arguments.plot).suffix != ".png":
        raise InputError(f"--plot {arguments.plot} must be a .png file")
    for folder in arguments.card:
        check_writable(existing_folder(folder, "--card", "ccf-llm train"))


def _name_and_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise InputError(f"--compare {text} is not NAME=PATH: write for example mf=runs/cf")
    if not Path(path).exists():
        raise InputError(
            f"--compare {text}: {path} does not exist, write it with evaluate --out or fit-cf"
        )
    return name, Path(path)


def _load_scores(path: Path, data: Path, split: str) -> "pd.DataFrame":
    """Scores of a split as `--compare` names them: a file of scores, or a folder of `fit-cf`."""
    from ccf_llm_hf.cf.fit import score_cf
    from ccf_llm_hf.evaluation import read_scores

    return score_cf(path, data, split) if path.is_dir() else read_scores(path)


def _pair(text: str, names: set[str]) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) != 2 or not set(parts) <= names:
        raise InputError(
            f"--average {text} is not NAME,NAME with names of {', '.join(sorted(names))}"
        )
    return parts[0], parts[1]


def _item(text: str) -> Any:
    """An id or title as it is; a JSON object as a dict."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _user_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument("--user", help="user id; one the model has not seen is a new user")
    history = parser.add_mutually_exclusive_group()
    history.add_argument(
        "--history",
        nargs="+",
        action="extend",
        metavar="ITEM",
        type=_item,
        help="liked items, oldest first: ids, titles, or JSON as of --candidates",
    )
    history.add_argument("--data", help="prepared folder to take the history of --user from")


def _load_ranker_and_history(arguments: argparse.Namespace) -> tuple["CTRRanker", list[Any]]:
    if arguments.data is not None and arguments.user is None:
        raise InputError("--data is there to look up the history of a user: add --user ID")
    check_checkpoint(arguments.checkpoint)
    history = list(arguments.history or [])
    if arguments.data is not None:
        from ccf_llm_hf.data.history import stored_history

        data = existing_folder(arguments.data, "--data", "ccf-llm prepare")
        history = stored_history(data, arguments.user)
    elif arguments.user is not None and not history:
        print(
            f"note: no history of user {arguments.user} was given, so none is used: "
            "--data FOLDER takes it from a prepared folder",
            file=sys.stderr,
        )
    from ccf_llm_hf.inference.ranker import CTRRanker

    return CTRRanker.from_pretrained(arguments.checkpoint, backbone=arguments.backbone), history


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    _user_arguments(parser)
    parser.add_argument(
        "--candidates",
        nargs="+",
        action="extend",
        metavar="ITEM",
        type=_item,
        help="ids, titles, or JSON for a new item with fields, such as "
        '\'{"title": "Emma", "author": "Jane Austen"}\' (default: the catalog)',
    )
    parser.add_argument("--top-k", type=int, default=10, help="items to return (default: 10)")
    parser.add_argument(
        "--preselect",
        type=int,
        default=100,
        help="items of the catalog that are scored: those that CF finds this user's own, in turn "
        "with those that share fields with what was liked (default: 100)",
    )
    parser.add_argument(
        "--max-per-topic",
        type=int,
        metavar="N",
        help="most items that may share an author, say: a value of one of the model's "
        "evidence_fields (default: no limit)",
    )
    parser.add_argument(
        "--shortlist",
        type=int,
        metavar="N",
        help="only so many go through the language model, those that promise most by CF, fields "
        "and text vectors; faster, and the list may lack an item (default: all)",
    )


def _rank(arguments: argparse.Namespace, _: list[str]) -> Output:
    ranker, history = _load_ranker_and_history(arguments)
    ranked = ranker.rank(
        user=arguments.user,
        history=history,
        candidates=arguments.candidates,
        top_k=arguments.top_k,
        preselect=arguments.preselect,
        max_per_topic=arguments.max_per_topic,
        shortlist=arguments.shortlist,
    )
    has_cf = bool(ranker.model.cf.item_known.any())
    lines = [f"{'':>4}  prob   item"]
    for place, item in enumerate(ranked, start=1):
        note = "  (not in the CF model)" if has_cf and not item.known else ""
        words = ranker.processor.item_text({"id": item.item_id, "title": item.title})[1]
        lines.append(f"{place:>3}.  {item.probability:.3f}  {words}{note}")
    data = {
        "user": arguments.user,
        "unknown_users": ranker.unknown([arguments.user], [])[0],
        "history": history,
        "items": [asdict(item) for item in ranked],
    }
    return Output("\n".join(lines), data)


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument(
        "--pairs",
        required=True,
        help="parquet, a folder of it, or CSV with user_id and item_id; parquet also history",
    )
    parser.add_argument("--out", required=True, help="folder of the shards; run again to go on")
    parser.add_argument(
        "--data",
        help="prepared folder with the users' likes, for pairs without history or a null one",
    )
    parser.add_argument(
        "--shard-rows", type=int, default=20_000, help="rows of a shard (default: 20000)"
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="score here, or on the machines of a Ray cluster (extra: ray)",
    )


def _score(arguments: argparse.Namespace, _: list[str]) -> Output:
    check_checkpoint(arguments.checkpoint)
    check_writable(arguments.out)
    from ccf_llm_hf.data.history import stored_histories
    from ccf_llm_hf.inference.ranker import CTRRanker
    from ccf_llm_hf.inference.score_pairs import PairScorer, checkpoint_identity

    histories = stored_histories(arguments.data) if arguments.data else {}
    ranker = CTRRanker.from_pretrained(arguments.checkpoint, backbone=arguments.backbone)
    identity = checkpoint_identity(arguments.checkpoint, ranker.model)
    settings = (ranker, identity, histories, arguments.shard_rows)
    scorer = PairScorer(*settings)
    if arguments.engine == "ray":
        from ccf_llm_hf.inference.ray_engine import RayPairScorer

        scorer = RayPairScorer(*settings, arguments.checkpoint, arguments.backbone)
    manifest = scorer.run(Path(arguments.pairs), Path(arguments.out))
    rows, new_rows = manifest["rows"], manifest["new_rows"]
    text = f"scored {new_rows:,} pairs into {arguments.out}"
    if new_rows < rows:
        text += f"; the other {rows - new_rows:,} were scored already"
    if not new_rows:
        text = f"all {rows:,} pairs were scored already, in {arguments.out}"
    if manifest["unknown"]:
        text += f"\n{manifest['unknown']}"
    return Output(text, manifest)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _user_arguments(parser)
    parser.add_argument(
        "--item", required=True, type=_item, help="the candidate: id, title, or JSON as of rank"
    )
    parser.add_argument(
        "--max-lines",
        type=int,
        default=16,
        help="lines of the history to leave out, each in turn, to see what they did (default: 16)",
    )


def _explain(arguments: argparse.Namespace, _: list[str]) -> Output:
    ranker, history = _load_ranker_and_history(arguments)
    explanation = ranker.explain(
        user=arguments.user,
        history=history,
        item=arguments.item,
        max_lines=arguments.max_lines,
        progress=True,
    )
    return Output(explanation.as_text(), asdict(explanation))


COMMANDS = {
    "evaluate": Command(
        "score a split: AUC, UAUC, intervals, slices, controls",
        "ccf-llm evaluate runs/demo/checkpoint --data runs/demo/data --out scores.parquet",
        _evaluate_arguments,
        _evaluate,
    ),
    "rank": Command(
        "the best items for a user or a history",
        'ccf-llm rank runs/demo/checkpoint --history "Carrie" "Misery" --top-k 5',
        _rank_arguments,
        _rank,
    ),
    "score": Command(
        "score a table of pairs of any length, in shards",
        "ccf-llm score runs/demo/checkpoint-slim --pairs pairs.parquet --out runs/scores",
        _score_arguments,
        _score,
    ),
    "explain": Command(
        "why an item has its place: the lines that moved it, words, behavior, CF",
        'ccf-llm explain runs/demo/checkpoint --history "Carrie" --item "The Green Mile"',
        _explain_arguments,
        _explain,
    ),
}
