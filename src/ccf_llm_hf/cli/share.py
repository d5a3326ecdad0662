"""The commands that show and publish what was made: `serve`, `merge`, and the pushes."""

import argparse
import math
from dataclasses import asdict

from ccf_llm_hf.cli.command import (
    Command,
    Output,
    checkpoint_arguments,
    existing_folder,
)
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import check_checkpoint


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    parser.add_argument(
        "--api",
        action="store_true",
        help="an API for programs instead of the page; asks for the bearer token in CCF_LLM_TOKEN, "
        "where that is set",
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        metavar="N",
        help="requests to the API that may wait; more are answered 429 (default: 64)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="in which the API answers, or answers 504 (default: 30)",
    )


def _serve(arguments: argparse.Namespace, _: list[str]) -> Output:
    check_checkpoint(arguments.checkpoint)
    from ccf_llm_hf.hub.serve import check_can_serve, read_token, serve, serve_api

    if arguments.max_waiting < 1:
        raise InputError(f"--max-waiting {arguments.max_waiting} lets none wait: give 1 or more")
    if not 0 < arguments.timeout < math.inf:
        raise InputError(f"--timeout {arguments.timeout:g} is no time: give seconds above 0")
    check_can_serve(arguments.host, arguments.port, "serve" if arguments.api else "app")
    where = {"host": arguments.host, "port": arguments.port}
    if arguments.api:
        token = read_token()
        from ccf_llm_hf.inference.ranker import CTRRanker

        serve_api(
            CTRRanker.from_pretrained(arguments.checkpoint, backbone=arguments.backbone),
            **where,
            token=token,
            max_waiting=arguments.max_waiting,
            timeout=arguments.timeout,
        )
    else:
        from ccf_llm_hf.inference.checkpoint import load_checkpoint

        serve(*load_checkpoint(arguments.checkpoint, backbone=arguments.backbone), **where)
    return Output("stopped", where)


def _replace_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--replace", action="store_true", help=f"push over {what} that is there")


def _push_space_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="Hub repository of the published model")
    parser.add_argument("--repo", required=True, help="Space to write to, org/name")
    parser.add_argument("--revision", help="of the model, to pin (default: its newest commit)")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    _replace_argument(parser, "another Space")
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")


def _push_space(arguments: argparse.Namespace, _: list[str]) -> Output:
    from ccf_llm_hf.hub.space import push_space

    pushed = push_space(
        arguments.checkpoint,
        arguments.repo,
        revision=arguments.revision,
        private=arguments.private or None,
        replace=arguments.replace,
        dry_run=arguments.dry_run,
    )
    return Output(pushed.as_text(), asdict(pushed))


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument("--out", required=True, help="folder to write the full checkpoint to")


def _merge(arguments: argparse.Namespace, _: list[str]) -> Output:
    check_checkpoint(arguments.checkpoint)
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
    _replace_argument(parser, "another model")
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")


def _push(arguments: argparse.Namespace, _: list[str]) -> Output:
    existing_folder(arguments.checkpoint, "checkpoint", "ccf-llm train")
    from ccf_llm_hf.hub.push import push

    published = push(
        arguments.checkpoint,
        arguments.repo,
        form=arguments.form,
        backbone=arguments.backbone,
        private=arguments.private or None,
        revision=arguments.revision,
        replace=arguments.replace,
        dry_run=arguments.dry_run,
    )
    return Output(published.as_text(), asdict(published))


def _push_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="prepared folder (see ccf-llm prepare)")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="Hub data set")
    parser.add_argument("--private", action="store_true", help="make a new data set private")
    parser.add_argument(
        "--i-have-permission",
        action="store_true",
        help="the rights holder allows you to share ratings whose license forbids it",
    )
    _replace_argument(parser, "another data set")
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")


def _push_dataset(arguments: argparse.Namespace, _: list[str]) -> Output:
    existing_folder(arguments.data, "prepared folder", "ccf-llm prepare")
    from ccf_llm_hf.hub.push_dataset import push_dataset

    pushed = push_dataset(
        arguments.data,
        arguments.repo,
        private=arguments.private,
        permission=arguments.i_have_permission,
        replace=arguments.replace,
        dry_run=arguments.dry_run,
    )
    return Output(pushed.as_text(), asdict(pushed))


COMMANDS = {
    "serve": Command(
        "a page to try a checkpoint on, in the browser, or an API",
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
