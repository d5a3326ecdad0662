"""The `ccf-llm` command. Heavy modules are imported inside the commands: help stays fast."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ccf_llm_hf.cli_arguments import CommandParser, add_config_arguments, config_from_arguments
from ccf_llm_hf.errors import InputError

SPLITS = ("train", "validation", "test")


class Output(NamedTuple):
    """What a command prints: `text` for people, `data` with --json."""

    text: str
    data: Any


class Command(NamedTuple):
    """One subcommand: its line in the overview, its example, its flags and its work."""

    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], Output]


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from ccf_llm_hf.configs import PrepareConfig

    parser.add_argument("source", choices=("ml-1m", "ml-100k", "table"), help="what to prepare")
    parser.add_argument("--out", required=True, help="folder to write")
    add_config_arguments(parser, PrepareConfig, skip=("source", "out"))


def _prepare(arguments: argparse.Namespace, _: list[str]) -> Output:
    from ccf_llm_hf.configs import PrepareConfig
    from ccf_llm_hf.data.prepare import format_summary, prepare
    from ccf_llm_hf.data.prepared import load_protocol

    folder = prepare(config_from_arguments(PrepareConfig, arguments), summary=False)
    protocol = load_protocol(folder)
    return Output(format_summary(protocol, folder), {"out": str(folder), "protocol": protocol})


def _fit_cf_arguments(parser: argparse.ArgumentParser) -> None:
    from ccf_llm_hf.configs import MFConfig

    parser.add_argument("model", choices=("mf",), help="which CF model to fit")
    parser.add_argument("--data", required=True, help="prepared folder (see ccf-llm prepare)")
    parser.add_argument("--out", required=True, help="folder to write")
    add_config_arguments(parser, MFConfig)


def _fit_cf(arguments: argparse.Namespace, _: list[str]) -> Output:
    data = _folder(arguments.data, "--data", "ccf-llm prepare")
    from ccf_llm_hf.cf.mf import fit_cf
    from ccf_llm_hf.configs import MFConfig

    config = config_from_arguments(MFConfig, arguments)
    embeddings = fit_cf(arguments.model, data, arguments.out, config)
    facts = {
        "out": arguments.out,
        "num_users": len(embeddings.user_ids),
        "num_items": len(embeddings.item_ids),
        "num_snapshots": embeddings.num_snapshots,
    }
    text = "wrote {out}: {num_users} users, {num_items} items, {num_snapshots} snapshots in time"
    return Output(text.format(**facts), facts | embeddings.metadata)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="YAML file; any entry can be overridden with --key value behind it"
    )


def _train(arguments: argparse.Namespace, overrides: list[str]) -> Output:
    if not Path(arguments.recipe).is_file():
        raise InputError(
            f"recipe {arguments.recipe} does not exist: name a YAML file like "
            "examples/configs/demo.yaml"
        )
    from ccf_llm_hf.training.run import run_recipe

    result = run_recipe(["--config", arguments.recipe, *overrides])
    return Output("\n".join(f"{key}: {value}" for key, value in result.items()), result)


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder, or a Hub repository")
    parser.add_argument("--backbone", help="folder or name to attach instead of the recorded one")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_arguments(parser)
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
        "--max-tokens-per-batch",
        type=int,
        default=2048,
        help="tokens scored at once; lower it when memory is short (default: 2048)",
    )


def _evaluate(arguments: argparse.Namespace, _: list[str]) -> Output:
    data = _folder(arguments.data, "--data", "ccf-llm prepare")
    paths = dict(_name_and_path(text) for text in arguments.compare)
    averages = [_pair(text, {arguments.name, *paths}) for text in arguments.average]
    _checkpoint(arguments.checkpoint)
    from ccf_llm_hf.cf.scoring import load_scores
    from ccf_llm_hf.data.prepared import load_prepared
    from ccf_llm_hf.evaluation import evaluate_scores, format_report, plot_calibration
    from ccf_llm_hf.inference.checkpoint import load_checkpoint
    from ccf_llm_hf.inference.gate import gate_report
    from ccf_llm_hf.inference.score_table import sample_users, score_table, write_scores

    split = load_prepared(data).splits[arguments.split]
    if arguments.sample_rows:
        split = sample_users(split, arguments.sample_rows)
    compare = {name: load_scores(path, data, arguments.split) for name, path in paths.items()}
    model, processor = load_checkpoint(arguments.checkpoint, backbone=arguments.backbone)
    scores = score_table(
        model, processor, split, max_tokens_per_batch=arguments.max_tokens_per_batch
    )
    write_scores(scores, arguments.out)
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
        _write_text(arguments.metrics_out, json.dumps(report, indent=2) + "\n")
    if arguments.plot:
        plot_calibration(scores, arguments.plot, name=arguments.name)
    for folder in arguments.card:
        from ccf_llm_hf.hub.model_card import describe_run

        describe_run(folder, data, report)
    return Output(format_report(report), report)


def _user_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_arguments(parser)
    parser.add_argument("--user", help="user id; one the model has not seen is a new user")
    history = parser.add_mutually_exclusive_group()
    history.add_argument(
        "--history", nargs="+", metavar="ITEM", help="liked items, oldest first: ids or titles"
    )
    history.add_argument("--data", help="prepared folder to take the history of --user from")


def _rank_arguments(parser: argparse.ArgumentParser) -> None:
    _user_arguments(parser)
    parser.add_argument(
        "--candidates", nargs="+", metavar="ITEM", help="ids or titles (default: the catalog)"
    )
    parser.add_argument("--top-k", type=int, default=10, help="items to return (default: 10)")
    parser.add_argument(
        "--preselect",
        type=int,
        default=100,
        help="items of the catalog that the CF model picks for scoring (default: 100)",
    )


def _rank(arguments: argparse.Namespace, _: list[str]) -> Output:
    ranker, history = _ranker_and_history(arguments)
    ranked = ranker.rank(
        user=arguments.user,
        history=history,
        candidates=arguments.candidates,
        top_k=arguments.top_k,
        preselect=arguments.preselect,
    )
    lines = [f"{'':>4}  prob    text  CF    item"]
    for place, item in enumerate(ranked, start=1):
        note = "" if item.known else "  (not in the CF model)"
        lines.append(
            f"{place:>3}.  {item.probability:.3f}   {item.text_share:4.0%}  {item.cf_share:4.0%}"
            f"  {item.title}{note}"
        )
    data = {"user": arguments.user, "history": history, "items": [asdict(item) for item in ranked]}
    return Output("\n".join(lines), data)


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_arguments(parser)
    parser.add_argument(
        "--pairs",
        required=True,
        help="parquet or CSV with user_id and item_id; parquet also history",
    )
    parser.add_argument("--out", required=True, help="folder of the shards; run again to go on")
    parser.add_argument(
        "--data", help="prepared folder with the users' likes, for pairs without history"
    )
    parser.add_argument(
        "--shard-rows", type=int, default=20_000, help="rows of a shard (default: 20000)"
    )


def _score(arguments: argparse.Namespace, _: list[str]) -> Output:
    _checkpoint(arguments.checkpoint)
    from ccf_llm_hf.inference.history import stored_histories
    from ccf_llm_hf.inference.ranker import CTRRanker
    from ccf_llm_hf.inference.score_pairs import PairScorer, checkpoint_identity

    histories = stored_histories(arguments.data) if arguments.data else {}
    ranker = CTRRanker.from_pretrained(arguments.checkpoint, backbone=arguments.backbone)
    scorer = PairScorer(
        ranker,
        checkpoint_identity(arguments.checkpoint, ranker.model),
        histories,
        arguments.shard_rows,
    )
    manifest = scorer.run(Path(arguments.pairs), Path(arguments.out))
    return Output(f"scored {manifest['rows']:,} pairs into {arguments.out}", manifest)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _user_arguments(parser)
    parser.add_argument("--item", required=True, help="id or title of the candidate")


def _explain(arguments: argparse.Namespace, _: list[str]) -> Output:
    ranker, history = _ranker_and_history(arguments)
    explanation = ranker.explain(user=arguments.user, history=history, item=arguments.item)
    return Output(explanation.as_text(), asdict(explanation))


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")


def _serve(arguments: argparse.Namespace, _: list[str]) -> Output:
    _checkpoint(arguments.checkpoint)
    from ccf_llm_hf.hub.serve import check_can_serve, serve

    check_can_serve(arguments.host, arguments.port)
    from ccf_llm_hf.inference.checkpoint import load_checkpoint

    model, processor = load_checkpoint(arguments.checkpoint, backbone=arguments.backbone)
    serve(model, processor, host=arguments.host, port=arguments.port)
    return Output("stopped", {"host": arguments.host, "port": arguments.port})


def _push_space_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="Hub repository of the published model")
    parser.add_argument("--repo", required=True, help="Space to write to, org/name")
    parser.add_argument("--revision", help="of the model, to pin (default: its newest commit)")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")


def _push_space(arguments: argparse.Namespace, _: list[str]) -> Output:
    from ccf_llm_hf.hub.space import push_space

    pushed = push_space(
        arguments.checkpoint,
        arguments.repo,
        revision=arguments.revision,
        private=arguments.private or None,
        dry_run=arguments.dry_run,
    )
    return Output(pushed.as_text(), asdict(pushed))


def _ranker_and_history(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    if arguments.data is not None and arguments.user is None:
        raise InputError("--data is there to look up the history of a user: add --user ID")
    if arguments.user is None and not arguments.history:
        raise InputError("nothing is known of this user: give --history ITEM ..., or --user ID")
    _checkpoint(arguments.checkpoint)
    history = list(arguments.history or [])
    if arguments.data is not None:
        from ccf_llm_hf.inference.history import stored_history

        data = _folder(arguments.data, "--data", "ccf-llm prepare")
        history = stored_history(data, arguments.user)
    elif not history:
        print(
            f"note: no history of user {arguments.user} was given, so none is used: "
            "--data FOLDER takes it from a prepared folder",
            file=sys.stderr,
        )
    from ccf_llm_hf.inference.ranker import CTRRanker

    return CTRRanker.from_pretrained(arguments.checkpoint, backbone=arguments.backbone), history


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    _checkpoint_arguments(parser)
    parser.add_argument("--out", required=True, help="folder to write the full checkpoint to")


def _merge(arguments: argparse.Namespace, _: list[str]) -> Output:
    _checkpoint(arguments.checkpoint)
    from ccf_llm_hf.hub.merge import merge_checkpoint

    out = str(merge_checkpoint(arguments.checkpoint, arguments.out, arguments.backbone))
    return Output(f"wrote {out}", {"checkpoint": arguments.checkpoint, "out": out})


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="Hub repository")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch, made if it is not there (default: main)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--slim",
        dest="form",
        action="store_const",
        const="slim",
        help="without the backbone, which whoever loads it fetches by name",
    )
    form.add_argument(
        "--full", dest="form", action="store_const", const="full", help="with the backbone in it"
    )
    parser.add_argument("--backbone", help="folder or name to attach instead of the recorded one")
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")


def _push(arguments: argparse.Namespace, _: list[str]) -> Output:
    _folder(arguments.checkpoint, "checkpoint", "ccf-llm train")
    from ccf_llm_hf.hub.push import publish
    from ccf_llm_hf.hub.staging import staged_checkpoint

    print(f"checking {arguments.checkpoint}, also in a process without this package")
    with staged_checkpoint(
        arguments.checkpoint, arguments.repo, form=arguments.form, backbone=arguments.backbone
    ) as staged:
        text, data = staged.as_text(), staged.as_dict()
        if arguments.dry_run:
            return Output(f"{text}\nnothing was sent", data)
        print(text)  # on stderr, before anything is sent
        published = publish(
            staged, arguments.repo, private=arguments.private, revision=arguments.revision
        )
    return Output(published.as_text(), data | published.as_dict())


def _push_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="prepared folder (see ccf-llm prepare)")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="Hub data set")
    parser.add_argument("--private", action="store_true", help="make a new data set private")
    parser.add_argument(
        "--i-have-permission",
        action="store_true",
        help="the rights holder allows you to share ratings whose license forbids it",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")


def _push_dataset(arguments: argparse.Namespace, _: list[str]) -> Output:
    _folder(arguments.data, "prepared folder", "ccf-llm prepare")
    from ccf_llm_hf.hub.push_dataset import push_dataset

    pushed = push_dataset(
        arguments.data,
        arguments.repo,
        private=arguments.private,
        permission=arguments.i_have_permission,
        dry_run=arguments.dry_run,
    )
    return Output(pushed.as_text(), asdict(pushed))


def _folder(path: str, flag: str, maker: str) -> Path:
    if not Path(path).is_dir():
        raise InputError(f"{flag} {path} is not a folder: make it with {maker}")
    return Path(path)


def _checkpoint(path: str) -> None:
    """Refuse what can be neither a folder nor a Hub repository, before torch is imported."""
    if Path(path).is_dir():
        return
    hub_like = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    # `runs/typo` looks like a repository, but where runs/ is a folder it is a mistyped path.
    if not hub_like or Path(path).parent.is_dir():
        raise InputError(
            f"checkpoint {path} is not a folder, and no Hub repository (org/name) either: "
            "make one with ccf-llm train"
        )


def _name_and_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise InputError(f"--compare {text} is not NAME=PATH: write for example mf=runs/cf")
    if not Path(path).exists():
        raise InputError(
            f"--compare {text}: {path} does not exist, write it with evaluate --out or fit-cf"
        )
    return name, Path(path)


def _pair(text: str, names: set[str]) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) != 2 or not set(parts) <= names:
        raise InputError(
            f"--average {text} is not NAME,NAME with names of {', '.join(sorted(names))}"
        )
    return parts[0], parts[1]


def _write_text(path: str, text: str) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    from ccf_llm_hf.configs import REPRODUCIBLE, ReproduceConfig

    parser.add_argument("dataset", choices=REPRODUCIBLE, help="which data set")
    add_config_arguments(parser, ReproduceConfig, skip=("dataset",))


def _reproduce(arguments: argparse.Namespace, _: list[str]) -> Output:
    from ccf_llm_hf.configs import ReproduceConfig
    from ccf_llm_hf.reproduce.run import reproduce
    from ccf_llm_hf.reproduce.table import markdown

    rows = reproduce(config_from_arguments(ReproduceConfig, arguments))
    return Output(markdown(rows), rows)


COMMANDS = {
    "prepare": Command(
        "turn ratings into train, validation and test files",
        "ccf-llm prepare ml-1m --out runs/data",
        _prepare_arguments,
        _prepare,
    ),
    "fit-cf": Command(
        "fit the collaborative-filtering model whose vectors are fused",
        "ccf-llm fit-cf mf --data runs/data --out runs/cf",
        _fit_cf_arguments,
        _fit_cf,
    ),
    "train": Command(
        "train by a recipe",
        "ccf-llm train examples/configs/demo.yaml --output_dir runs/mine",
        _train_arguments,
        _train,
    ),
    "evaluate": Command(
        "score a split: AUC, UAUC, intervals, slices, controls",
        "ccf-llm evaluate runs/demo/checkpoint --data runs/demo/data --out scores.parquet",
        _evaluate_arguments,
        _evaluate,
    ),
    "reproduce": Command(
        "the results table: every arm and its controls, with intervals",
        "ccf-llm reproduce ml-1m --budget quick --seeds 1",
        _reproduce_arguments,
        _reproduce,
    ),
    "rank": Command(
        "the best items for a user or a history",
        'ccf-llm rank runs/demo/checkpoint --history "Toy Story (1995)" "Heat (1995)" --top-k 5',
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
        "one prediction, taken apart",
        'ccf-llm explain runs/demo/checkpoint --history "Toy Story (1995)" --item "Heat (1995)"',
        _explain_arguments,
        _explain,
    ),
    "serve": Command(
        "a page to try a checkpoint on, in the browser",
        "ccf-llm serve runs/demo/checkpoint-slim --port 7860",
        _serve_arguments,
        _serve,
    ),
    "push-space": Command(
        "publish that page as a Space of the Hub",
        "ccf-llm push-space org/ccf-llm-ml1m --repo org/ccf-llm-demo --dry-run",
        _push_space_arguments,
        _push_space,
    ),
    "merge": Command(
        "make a slim checkpoint and its backbone one self-contained checkpoint",
        "ccf-llm merge runs/demo/checkpoint-slim --out runs/merged",
        _merge_arguments,
        _merge,
    ),
    "push": Command(
        "check a checkpoint and publish it on the Hub",
        "ccf-llm push runs/demo/checkpoint-slim --repo acme/films --private --dry-run",
        _push_arguments,
        _push,
    ),
    "push-dataset": Command(
        "publish a prepared folder as a data set of the Hub",
        "ccf-llm push-dataset runs/own --repo acme/shop-ctr --private --dry-run",
        _push_dataset_arguments,
        _push_dataset,
    ),
}


def _overview() -> CommandParser:
    lines = "\n".join(f"  {name:<14}{command.summary}" for name, command in COMMANDS.items())
    parser = CommandParser(
        prog="ccf-llm",
        usage="ccf-llm COMMAND ... [--json]",
        description="CTR prediction that fuses a language model with collaborative filtering.",
        epilog=f"commands:\n{lines}\n\nccf-llm COMMAND --help shows its flags and an example.",
    )
    parser.add_argument("command", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
    return parser


def _parse(argv: list[str]) -> tuple[Command, argparse.Namespace, list[str]]:
    name = _overview().parse_args(argv[:1]).command
    command = COMMANDS[name]
    parser = CommandParser(
        prog=f"ccf-llm {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n  {command.example}",
    )
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    arguments, rest = parser.parse_known_args(argv[1:])
    if rest and name != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return command, arguments, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 after `error: ...` for bad input."""
    try:
        command, arguments, rest = _parse(list(sys.argv[1:] if argv is None else argv))
        # Libraries print to stdout at will; there it would break --json.
        with contextlib.redirect_stdout(sys.stderr):
            output = command.run(arguments, rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(output.data, indent=2) if arguments.json else output.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
