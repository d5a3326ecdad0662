"""What a card says of a run, from its training.json: recipe, stages, machine and time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Record = Mapping[str, Any]


def recipe_yaml(training: Record) -> str:
    """The recipe as YAML; empty when training.json holds none."""
    recipe = without_local_paths(dict(training.get("recipe") or {}))
    return yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else ""


def stages_markdown(training: Record) -> str:
    """What each stage trained, on how much, for how long, and what validation said."""
    stages = training.get("stages") or {}
    if not stages:
        return ""
    lines = [
        "| stage | trains | labels | steps (best) | parameters | minutes | validation AUC | UAUC |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, stage in stages.items():
        validation, settings = stage.get("validation", {}), stage.get("settings", {})
        cells = [
            name,
            " and ".join(settings.get("train", [])) or "-",
            _count(stage.get("train_labels")),
            f"{_count(stage.get('steps'))} ({_count(stage.get('best_step'))})",
            _count(stage.get("trainable_parameters")),
            _number(stage.get("minutes"), 1),
            _number(validation.get("auc"), 4),
            _number(validation.get("uauc"), 4),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_sentence(training: Record) -> str:
    """How long the run took, on what; empty when training.json does not say."""
    hardware, minutes = training.get("hardware"), training.get("minutes")
    if not hardware or minutes is None:
        return ""
    processes = hardware["processes"]
    machine = hardware["accelerator"] or f"{hardware['cpus']} CPU cores ({hardware['processor']})"
    precision = f"backbone in {'bfloat16' if hardware['bf16_backbone'] else 'float32'}"
    packages = training.get("versions", {}).items()
    versions = ", ".join(f"{name} {version}" for name, version in packages)
    return (
        f"{_duration(minutes)} in all, training and validation, in {processes} "
        f"process{'es' if processes > 1 else ''} on {machine}, {precision}; "
        f"Python {hardware['python']}{', ' if versions else ''}{versions}."
    )


def gate_sentence(training: Record) -> str:
    """The gate as the last stage's validation saw it; empty for a run without a gate."""
    stages = list((training.get("stages") or {}).values())
    validation = stages[-1].get("validation", {}) if stages else {}
    if "gate_mean" not in validation:
        return ""
    mean, std = validation["gate_mean"], validation["gate_std"]
    return (
        f"Share of text over a sample of items and all dimensions: mean {mean:.3f}, std {std:.3f}."
    )


def inputs_markdown(training: Record) -> str:
    """Checksums of the files that the run read."""
    inputs = training.get("inputs") or {}
    return "\n".join(f"- {name}: sha256 `{digest}`" for name, digest in inputs.items())


def without_local_paths(value: Any) -> Any:
    """Absolute paths cut to their last part: a card is shared, its author's machine is not."""
    if isinstance(value, dict):
        return {key: without_local_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(part) for part in value]
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def _duration(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
