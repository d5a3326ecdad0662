"""The command `doctor`: what is wrong, or will be, before hours are spent on it."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccf_llm_hf.cli.command import Command, Output
from ccf_llm_hf.errors import InputError

if TYPE_CHECKING:
    from ccf_llm_hf.data.prepared import PreparedData
    from ccf_llm_hf.training.estimate import StageEstimate
    from ccf_llm_hf.training.recipe import Recipe

GB = 1e9
SPLITS = ("train", "validation", "test")
LEAST_KNOWN = 0.9  # of training rows, whose users and items a CF table should know
LONG = 12 * 60  # minutes of a training that a shorter one should come before
LEAST_FREE = 0.5  # GB of memory, while a recipe is trained
RUN_GB = 2.0  # that a run of a small backbone writes, full checkpoint included


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        nargs="?",
        metavar="CHECKPOINT|DATA|RECIPE",
        help="checkpoint folder or Hub repository, prepared folder, or recipe (default: none, the "
        "environment alone)",
    )
    parser.add_argument("--backbone", help="of a slim checkpoint: what to attach")
    parser.add_argument("--cf", help="of a prepared folder: CF vectors that shall know its ids")


def _doctor(arguments: argparse.Namespace, _: list[str]) -> Output:
    report: dict[str, Any] = {"environment": examine_environment()}
    wrong = _judge_environment(report["environment"])
    lines = _tell_environment(report["environment"])
    if arguments.target:
        kind = find_kind(arguments.target)
        examine = {"checkpoint": _checkpoint, "data": _data, "recipe": _recipe}[kind]
        report[kind], more, found = examine(arguments)
        lines += ["", *more]
        wrong += found
    report["to_mend"] = wrong
    lines += ["", *(f"to mend: {sentence}" for sentence in wrong)]
    if not wrong:
        lines.append("nothing to mend")
    return Output("\n".join(lines), report, 2 if wrong else 0)


def find_kind(target: str) -> str:
    """What a name stands for: `checkpoint`, `data` or `recipe`.

    Raises:
        InputError: none of them.
    """
    from ccf_llm_hf.inference.checkpoint import check_checkpoint

    path = Path(target)
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            return "recipe"
        raise InputError(f"{target} is no recipe, which is a .yaml file: name one, or a folder")
    if (path / "protocol.json").is_file():
        return "data"
    check_checkpoint(target)
    return "checkpoint"


def examine_environment() -> dict[str, Any]:
    """Machine, versions with the ranges that are supported, memory, disk and cache."""
    import psutil
    import torch

    from ccf_llm_hf.data.asset_list import ASSETS
    from ccf_llm_hf.data.assets import cache_folder, cached_backbone
    from ccf_llm_hf.training.run import name_processor
    from ccf_llm_hf.training.stage import uses_bf16

    memory, cache = psutil.virtual_memory(), cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    accelerator = torch.accelerator.current_accelerator()
    return {
        "python": platform.python_version(),
        "processor": name_processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator.type if accelerator else None,
        "multiplies_bf16": uses_bf16("auto"),
        "memory_gb": round(memory.total / GB, 1),
        "free_memory_gb": round(memory.available / GB, 1),
        "free_disk_gb": round(shutil.disk_usage(".").free / GB, 1),
        "cache": {
            "folder": str(cache),
            "free_disk_gb": round(shutil.disk_usage(existing).free / GB, 1),
            "assets": sorted(
                asset.name
                for asset in ASSETS.values()
                if (cache / asset.name).is_dir()
                and (not asset.hub_id or cached_backbone(asset.name) != asset.name)
            ),
        },
        "packages": examine_packages(),
    }


def examine_packages() -> list[dict[str, Any]]:
    """Of each package that this one needs: name, version here (None: missing), versions that will
    do, and whether it is one of them."""
    from packaging.requirements import Requirement

    found = []
    for text in importlib.metadata.requires("ccf-llm-hf") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        found.append(
            {
                "name": wanted.name,
                "version": version,
                "wanted": str(wanted.specifier) or "any",
                "fits": fits,
            }
        )
    return found


def _judge_environment(found: dict[str, Any]) -> list[str]:
    wrong = [
        f"{one['name']} is {one['version'] or 'missing'}, and {one['wanted']} is supported: "
        f"pip install '{one['name']}{'' if one['wanted'] == 'any' else one['wanted']}'"
        for one in found["packages"]
        if not one["fits"]
    ]
    for place, free in (
        ("this folder", found["free_disk_gb"]),
        (f"the cache, {found['cache']['folder']},", found["cache"]["free_disk_gb"]),
    ):
        if free < RUN_GB:
            wrong.append(f"the disk of {place} has {free} GB left: make room")
    return wrong


def _tell_environment(found: dict[str, Any]) -> list[str]:
    cache, bf16 = found["cache"], "bfloat16" if found["multiplies_bf16"] else "no bfloat16"
    shown = ("torch", "transformers", "datasets", "peft")
    versions = [f"{p['name']} {p['version']}" for p in found["packages"] if p["name"] in shown]
    return [
        f"environment: Python {found['python']}, {', '.join(versions)}",
        f"  {found['cpus']} CPUs, {found['threads']} threads, {bf16}, "
        f"{found['accelerator'] or 'no'} accelerator",
        f"  memory: {found['free_memory_gb']} of {found['memory_gb']} GB free; disk: "
        f"{found['free_disk_gb']} GB free",
        f"  cache {cache['folder']}: {', '.join(cache['assets']) or 'empty'}",
    ]


def _checkpoint(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], list[str]]:
    from ccf_llm_hf.hub.example import measure_recorded
    from ccf_llm_hf.inference.checkpoint import load_checkpoint

    folder = Path(arguments.target)
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    found: dict[str, Any] = {"path": arguments.target, "files": files, "loads": False}
    lines = [f"checkpoint {arguments.target}"]
    if files:
        lines.append(f"  {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB")
    try:
        model, processor = load_checkpoint(arguments.target, backbone=arguments.backbone)
    except InputError as error:
        return found, [*lines, "  does not load"], [str(error)]
    config, cf = model.config, model.cf
    found |= {
        "loads": True,
        "form": config.checkpoint_form,
        "backbone": config.backbone_name,
        "users": len(processor.user_ids),
        "items": len(processor.item_ids),
        "items_known_to_cf": int(cf.item_known.sum()),
        "wording": processor.wording,
        "history_window": list(processor.history_window),
        "tokenizer": len(processor.tokenizer),
        "parameters": sum(one.numel() for one in model.parameters()),
    }
    lines += [
        f"  loads: {found['form']} form on {found['backbone']}, {found['parameters']:,} parameters",
        f"  {found['items']:,} items, {found['items_known_to_cf']:,} of them known to CF; "
        f"{found['users']:,} users; tokenizer of {found['tokenizer']:,}",
        f"  prompt: {found['wording']}, window {found['history_window']}",
    ]
    wrong = []
    if folder.is_dir():
        try:
            difference = measure_recorded(folder, model, processor)
            found["largest_difference"] = difference
            if difference is not None:
                lines.append(f"  scores its recorded calls as recorded, to {difference:.1e}")
        except InputError as error:
            wrong.append(str(error))
    return found, lines, wrong


def _data(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], list[str]]:
    from ccf_llm_hf.data.prepared import load_prepared

    data = load_prepared(arguments.target)
    found, lines, wrong = examine_data(data)
    if arguments.cf:
        from ccf_llm_hf.cf.vectors import CFVectors

        known, said, more = examine_known(data, CFVectors.load(arguments.cf), arguments.cf)
        found["cf"] = known
        lines, wrong = [*lines, *said], [*wrong, *more]
    return found, lines, wrong


def examine_data(data: "PreparedData") -> tuple[dict[str, Any], list[str], list[str]]:
    """Counts of a prepared folder, lines that tell them, and what is wrong with it."""
    protocol = data.protocol
    kind = protocol.get("histories", "likes")
    found: dict[str, Any] = {
        "path": str(data.path),
        "items": len(data.items),
        "histories": kind,
        "has_times": protocol.get("has_times", True),
        "item_fields": protocol.get("item_fields", []),
    }
    lines = [
        f"data {data.path}: {len(data.items):,} items, histories of {kind}, "
        f"fields: {', '.join(found['item_fields']) or 'titles alone'}"
    ]
    wrong = []
    for name in SPLITS:
        split = data.splits[name].select_columns(["user_id", "item_id", "label", "not_cold"])
        table = split.to_pandas()
        rows, labels = len(table), table["label"]
        found[name] = {
            "rows": rows,
            "users": int(table["user_id"].nunique()),
            "liked": round(float(labels.mean()), 4) if rows else None,
            "cold": round(1 - float(table["not_cold"].mean()), 4) if rows else None,
        }
        shown = (
            f"{labels.mean():.1%} liked, {1 - table['not_cold'].mean():.1%} cold" if rows else ""
        )
        lines.append(f"  {name}: {rows:,} rows, {found[name]['users']:,} users, {shown}")
        if labels.nunique() < 2:
            wrong.append(
                f"the {name} split of {data.path} has rows of {labels.nunique()} classes, and none "
                "can be told apart: prepare it with another --split or threshold"
            )
    if empty := sum(not title for title in data.items["title"]):
        lines.append(f"  {empty:,} items have no title")
    return found, lines, wrong


def examine_known(
    data: "PreparedData", cf: Any, folder: str
) -> tuple[dict[str, Any], list[str], list[str]]:
    """How many of the training rows a CF table knows, by user and by item."""
    found, wrong = {}, []
    for side, own in (("user", cf.user_ids), ("item", cf.item_ids)):
        ids = data.splits["train"].to_pandas()[f"{side}_id"]
        known = ids.isin(own)
        found[f"{side}s_known"] = round(float(known.mean()), 4) if len(ids) else 1.0
        if found[f"{side}s_known"] < LEAST_KNOWN:
            stranger = ids[~known].iloc[0]
            wrong.append(
                f"the CF vectors in {folder} know the {side}s of {known.mean():.0%} of the "
                f"training rows, and not {stranger!r}: fit them on this data"
            )
    line = (
        f"  CF vectors {folder} know the users of {found['users_known']:.0%} and the items of "
        f"{found['items_known']:.0%} of the training rows"
    )
    return found, [line], wrong


def _recipe(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], list[str]]:
    import psutil

    from ccf_llm_hf.training.estimate import estimate_recipe
    from ccf_llm_hf.training.recipe import parse_recipe
    from ccf_llm_hf.training.stage import RunInputs

    recipe = parse_recipe(["--config", arguments.target])
    inputs = RunInputs.load(recipe)
    data, lines, wrong = examine_data(inputs.data)
    found: dict[str, Any] = {"path": arguments.target, "data": data}
    if inputs.cf is not None:
        found["cf"], said, more = examine_known(inputs.data, inputs.cf, recipe.cf_dir)
        lines, wrong = [*lines, *said], [*wrong, *more]
    stages = estimate_recipe(recipe, inputs)
    found["stages"] = [asdict(stage) | {"minutes": stage.minutes} for stage in stages]
    found["minutes"] = sum(stage.minutes for stage in stages)
    lines = [f"recipe {arguments.target}", *lines]
    for stage in stages:
        lines += _tell_stage(stage)
    lines.append(f"  all stages: {_duration(found['minutes'])}, beyond loading and saving")
    free = psutil.virtual_memory().available / GB
    return found, lines, [*wrong, *judge_recipe(recipe, stages, free)]


def _tell_stage(stage: "StageEstimate") -> list[str]:
    bound = f" of {stage.positions:,} positions" if stage.positions else ""
    read = f", reading the catalog's words {_duration(stage.text_minutes)}"
    memory = "" if stage.memory_gb is None else f", {stage.memory_gb:.1f} GB of memory"
    return [
        f"  stage {stage.name}: {stage.labels:,} labels in {stage.steps:,} steps, "
        f"{stage.tokens_per_label:.1f} tokens a label, longest prompt {stage.longest_prompt:,} "
        f"tokens{bound}",
        f"    training {_duration(stage.train_minutes)}, validation "
        f"{_duration(stage.validation_minutes)}{read if stage.text_minutes else ''}{memory}",
    ]


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def judge_recipe(recipe: "Recipe", stages: list["StageEstimate"], free_gb: float) -> list[str]:
    """What to change in a recipe, in sentences; `free_gb` of memory are left while it trains."""
    from ccf_llm_hf.training.stage import uses_bf16

    wrong = []
    for stage, estimate in zip(recipe.stages, stages, strict=True):
        if estimate.memory_gb is not None and free_gb < LEAST_FREE:
            wrong.append(
                f"stage {stage.name!r} takes {estimate.memory_gb:.1f} GB of memory, which leaves "
                f"{free_gb:.1f} GB free: lower `tokens_per_batch`, which changes no result"
            )
        if estimate.minutes > LONG:
            labels = max(1, int(estimate.labels * 60 / estimate.minutes))
            wrong.append(
                f"stage {stage.name!r} takes {_duration(estimate.minutes)}: try "
                f"`max_train_labels: {labels}` first, which takes an hour"
            )
    if recipe.precision == "bf16" and not uses_bf16("auto"):
        wrong.append(
            "`precision: bf16` is slower than fp32 on this machine, which does not multiply "
            "bfloat16: write auto"
        )
    return wrong


COMMANDS = {
    "doctor": Command(
        "examine the environment, a checkpoint, data or a recipe, and say what to mend",
        "ccf-llm doctor examples/configs/demo.yaml",
        _arguments,
        _doctor,
    ),
}
