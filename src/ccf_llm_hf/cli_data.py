"""The commands that make what a model is trained on: `prepare` and `fit-cf`."""

import argparse

from ccf_llm_hf.cli_arguments import add_config_arguments, config_from_arguments
from ccf_llm_hf.cli_command import Command, Output, existing_folder


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    from ccf_llm_hf.configs import SOURCES, PrepareConfig

    parser.add_argument(
        "source",
        choices=SOURCES,
        help="MovieLens (ml-*: downloaded), Amazon Reviews of books (--input), CoLLM's published "
        "pickles (--input), or a table of your own (--interactions)",
    )
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
    data = existing_folder(arguments.data, "--data", "ccf-llm prepare")
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
