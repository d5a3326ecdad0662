"""The commands that make what a model is trained on: `prepare` and `fit-cf`."""

import argparse

from ccf_llm_hf.cli.arguments import (
    add_config_arguments,
    add_json_argument,
    config_from_arguments,
)
from ccf_llm_hf.cli.command import Command, Output, existing_folder
from ccf_llm_hf.io import check_writable


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from ccf_llm_hf.data.config import SOURCES, PrepareConfig

    parser.add_argument(
        "source",
        choices=SOURCES,
        help="MovieLens and Book-Crossing (downloaded), Amazon Reviews of books (--input), CoLLM's "
        "published pickles (--input), or a table of your own (--interactions)",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    add_config_arguments(parser, PrepareConfig, skip=("source", "out"))


def _prepare(arguments: argparse.Namespace, _: list[str]) -> Output:
    from ccf_llm_hf.data.config import PrepareConfig
    from ccf_llm_hf.data.prepare import format_summary, prepare
    from ccf_llm_hf.data.prepared import load_protocol

    folder = prepare(config_from_arguments(PrepareConfig, arguments), summary=False)
    protocol = load_protocol(folder)
    return Output(format_summary(protocol, folder), {"out": str(folder), "protocol": protocol})


def _fit_cf_arguments(parser: argparse.ArgumentParser) -> None:
    from ccf_llm_hf.cf.config import CF_CONFIGS

    models = parser.add_subparsers(
        dest="model",
        required=True,
        metavar="MODEL",
        help=f"which CF model to fit, one of {', '.join(CF_CONFIGS)}; "
        "ccf-llm fit-cf MODEL --help shows its settings",
    )
    for name, config_class in CF_CONFIGS.items():
        model = models.add_parser(name)
        model.add_argument("--data", required=True, help="prepared folder (see ccf-llm prepare)")
        model.add_argument("--out", required=True, help="folder to write")
        add_config_arguments(model, config_class)
        add_json_argument(model)


def _fit_cf(arguments: argparse.Namespace, _: list[str]) -> Output:
    data = existing_folder(arguments.data, "--data", "ccf-llm prepare")
    from ccf_llm_hf.cf.config import CF_CONFIGS
    from ccf_llm_hf.cf.fit import fit_cf

    config = config_from_arguments(CF_CONFIGS[arguments.model], arguments)
    check_writable(arguments.out)
    vectors = fit_cf(arguments.model, data, arguments.out, config)
    facts = {
        "out": arguments.out,
        "num_users": len(vectors.user_ids),
        "num_items": len(vectors.item_ids),
        "num_fits": vectors.num_fits,
    }
    text = "wrote {out}: {num_users} users, {num_items} items, vectors fitted on all training rows"
    if vectors.num_fits > 1:
        parts = "folds of users" if vectors.cross_fit == "users" else vectors.cross_fit
        text += f" and cross-fit in {vectors.num_fits - 1} {parts}"
    return Output(text.format(**facts), facts | vectors.metadata)


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
}
