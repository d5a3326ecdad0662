"""Recipes: what a training run does, as one YAML file.

A recipe is a list of stages on one backbone, one prepared data folder and one CF table. A stage has
four sections, whose keys are the fields of the classes that they go to: `model` (`CCFLLMConfig`),
`prompt` (`CCFLLMProcessor`), `lora` (`peft.LoraConfig`), `training` (`CTRTrainingArguments`). The
two stages of the paper, a single joint stage and every staged-training ablation are recipes.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import peft
import torch
import yaml
from trl import TrlParser

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import FUSIONS, ITEM_TEXTS, CCFLLMConfig
from ccf_llm_hf.modeling.processing_ccf_llm import HISTORIES, CCFLLMProcessor
from ccf_llm_hf.modeling.prompt_ccf_llm import ITEM_FORMATS, WORDINGS
from ccf_llm_hf.training.arguments import MOST_SEEDS, CTRTrainingArguments
from ccf_llm_hf.training.lora import check_lora
from ccf_llm_hf.training.trainer import check_left_to_sampler
from ccf_llm_hf.training.values import read_value

MOST_NODES = 10_000  # values of a recipe
MANY = 20  # keys that are more than a sentence can list
PRECISIONS = ("fp32", "bf16", "auto")
LORA_DEFAULTS = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # TALLRec's prompt (arXiv 2305.00447): written titles, no slots.
    "text_only": {"prompt": {"history_format": "title", "candidate_format": "title"}},
    # CoLLM's (arXiv 2310.19488): a slot of the CF vector alone behind every written title.
    "concat": {
        "model": {"fusion": "cf_only"},
        "prompt": {"history_format": "title_slot", "candidate_format": "title_slot"},
    },
}
SECTIONS: dict[str, type] = {
    "model": CCFLLMConfig,
    "prompt": CCFLLMProcessor,
    "lora": peft.LoraConfig,
    "training": CTRTrainingArguments,
}
# What the run decides itself: from the data, the CF vectors, the backbone, or the whole recipe.
DECIDED = {
    "model": (
        "text_config",
        "cf_user_precision",
        "cf_dim",
        "num_users",
        "num_items",
        "text_width",
        "text_prefix_ids",
        "sentence_encoder_revision",
        "sentence_encoder_fingerprint",
        "num_title_tokens",
        "slot_scale",
        "yes_token_id",
        "no_token_id",
        "item_slot_token_id",
        "user_slot_token_id",
        "logit_temperature",
        "cf_model",
        "ids_fingerprint",
        "num_field_values",
        "num_item_values",
        "lora",
        "backbone_name",
        "backbone_revision",
        "backbone_fingerprint",
        "checkpoint_form",
    ),
    "prompt": (
        "tokenizer",
        "item_ids",
        "item_titles",
        "user_ids",
        "item_fields",
        "field_values",
        "rating_scale",
    ),
    "lora": ("inference_mode", "base_model_name_or_path", "revision", "task_type", "peft_type"),
    "training": (
        "output_dir",
        "seed",
        "has_times",
        "resume_from_checkpoint",
        "remove_unused_columns",
    ),
}
CHOICES = {
    "fusion": FUSIONS,
    "item_text": ITEM_TEXTS,
    "wording": WORDINGS,
    "history_format": ITEM_FORMATS,
    "candidate_format": ITEM_FORMATS,
    "histories": HISTORIES,
}


@dataclass
class Stage:
    """One stage: how its model, prompt, LoRA and training differ from the defaults of their
    classes. LoRA learns if there is a `lora` section, alignment networks, gate and cold vectors if
    the prompt shows slots."""

    name: str = field(default="", metadata={"help": "Folder name of the stage."})
    preset: str = field(
        default="",
        metadata={
            "help": "Settings to start from: text_only (written titles, no slots: TALLRec's form) "
            "or concat (slots of the CF vector alone behind written titles: CoLLM's)."
        },
    )
    init_from: str = field(
        default="",
        metadata={
            "help": "Where trained weights come from: an earlier stage's name, a slim checkpoint "
            "(folder, or Hub repository org/name or org/name@revision) or a PEFT adapter folder, "
            "whose LoRA rank and modules then hold. Its catalog may be another one than this "
            "run's. Empty: a fresh start. From a checkpoint without slots, or that fills them in "
            "another way, only the LoRA adapter is taken."
        },
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of `CCFLLMConfig`, such as fusion."}
    )
    prompt: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Arguments of `CCFLLMProcessor`, such as history_window."},
    )
    lora: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Fields of `peft.LoraConfig`; over r: 8, lora_alpha: 16, target_modules: "
            "[q_proj, v_proj]. Without the section LoRA (of init_from) stays as it is."
        },
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of `CTRTrainingArguments`, such as learning_rate."},
    )

    def __post_init__(self) -> None:
        """Check names, types and values; raises `InputError`."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise InputError(
                f"every stage needs a `name` of letters, digits, dots and dashes; got {self.name!r}"
            )
        if self.preset:
            check_choice(self._place(), "preset", self.preset, tuple(PRESETS))
        for section in SECTIONS:
            given = getattr(self, section)
            if given is None and section == "lora":
                continue
            if not isinstance(given, Mapping):
                raise InputError(
                    f"{self._place()}: `{section}` must be a mapping of settings; got {given!r}"
                )
            setattr(self, section, self._read_section(section, given))
        self._check_values()

    def _place(self) -> str:
        return f"stage {self.name!r}"

    def _read_section(self, section: str, given: Mapping[str, Any]) -> dict[str, Any]:
        defaults = PRESETS.get(self.preset, {}).get(section, {})
        if section == "lora":
            defaults = LORA_DEFAULTS
        kinds, settings = fields_of(section), dict(defaults)
        for key, value in given.items():
            if key in DECIDED[section]:
                raise InputError(
                    f"{self._place()}: `{key}` of `{section}` is decided by the run: leave it out"
                )
            if key not in kinds:
                refuse_key(f"{self._place()}: `{section}`", str(key), section)
            if key == "fusion" and isinstance(value, str) and value in PRESETS:
                raise InputError(
                    f"{self._place()}: {value} is a prompt now, no fusion: write `preset: {value}` "
                    "in the stage"
                )
            if key in CHOICES:
                check_choice(self._place(), key, value, CHOICES[key])
            settings[key] = read_value(f"{self._place()}: `{section}.{key}`", kinds[key], value)
        return settings

    def _check_values(self) -> None:
        """Let the classes themselves say what cannot be."""
        window = self.prompt.get("history_window", (0, 1))
        if not (len(window) == 2 and window[0] >= 0 and window[1] >= 1):
            raise InputError(
                f"{self._place()}: `history_window` must be [H, S], H >= 0 and S >= 1; "
                f"got {list(window)}"
            )
        if self.model.get("cf_fold_in") and not self.model.get("cf_logit"):
            raise InputError(f"{self._place()}: `cf_fold_in` needs cf_logit: true")
        try:
            args = CTRTrainingArguments(output_dir=".", **self.training)
            check_left_to_sampler(args)
            if args.eval_strategy == "no" or not args.load_best_model_at_end:
                raise InputError(
                    "a stage ends with the weights of its best validation: leave eval_strategy at "
                    "epoch or steps, and load_best_model_at_end on"
                )
            if lora := self.lora_config():
                check_lora(lora)
        except (ValueError, TypeError) as problem:  # InputError is a ValueError
            reason = " ".join(str(problem).split())
            raise InputError(f"{self._place()}: {reason}") from problem

    def lora_config(self) -> peft.LoraConfig | None:
        """The `lora` section as PEFT takes it; None without one."""
        return None if self.lora is None else peft.LoraConfig(**self.lora)

    def shows_slots(self) -> bool:
        """Whether the prompt has slots."""
        forms = [self.prompt.get(key, "slot") for key in ("history_format", "candidate_format")]
        return forms != ["title", "title"]

    def reads_cf(self) -> bool:
        """Whether the stage reads the CF table."""
        taught = self.training.get("cf_distillation", 0) > 0
        return bool(self.shows_slots() or self.model.get("cf_logit") or taught)

    def trains(self) -> list[str]:
        """Which parts learn, besides the scales of the score: `fusion`, `lora` or both."""
        parts = []
        if self.shows_slots():
            parts.append("fusion")
        if self.lora is not None:
            parts.append("lora")
        return parts


@lru_cache
def fields_of(section: str) -> dict[str, Any]:
    """Names that a section takes, and their types."""
    kind: Any = SECTIONS[section]
    if section in ("lora", "training"):  # dataclasses; the others spell out what they take
        # PEFT names torch in hints of fields, and imports it for type checkers alone.
        hints = get_type_hints(kind, localns={"torch": torch})
        return {spec.name: hints[spec.name] for spec in dataclasses.fields(kind) if spec.init}
    hints = get_type_hints(kind.__init__)
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def refuse_key(place: str, key: str, section: str = "") -> NoReturn:
    """Raise `InputError` for a key that a section, or without one a stage, does not have."""
    homes = [
        name
        for name in SECTIONS
        if name != section and key in fields_of(name) and key not in DECIDED[name]
    ]
    if homes:
        raise InputError(f"{place} has no {key!r}: it belongs into the section `{homes[0]}`")
    if section:
        known = sorted(set(fields_of(section)) - set(DECIDED[section]))
    else:
        known = [spec.name for spec in dataclasses.fields(Stage)]
    near = get_close_matches(key, known, cutoff=0.4)
    if len(known) > MANY and near:
        raise InputError(
            f"{place} has the unknown key {key!r}; near it are {', '.join(near)}, and all are in "
            "docs/recipe.md"
        )
    if len(known) > MANY:
        raise InputError(f"{place} has the unknown key {key!r}; docs/recipe.md lists those it has")
    raise InputError(f"{place} has the unknown key {key!r}; known keys are {', '.join(known)}")


@dataclass
class Recipe:
    """A whole run. Every field but `stages` can be overridden by a flag of the same name."""

    data_dir: str = field(
        default="", metadata={"help": "Prepared data folder (`ccf-llm prepare ... --out`)."}
    )
    cf_dir: str = field(
        default="",
        metadata={"help": "CF vectors (`ccf-llm fit-cf ... --out`); empty for runs of words only."},
    )
    output_dir: str = field(default="", metadata={"help": "Folder of the run, made if missing."})
    backbone: str = field(
        default="smollm2-135m-instruct",
        metadata={"help": "Language model: asset name, local folder or Hub id."},
    )
    backbone_revision: str = field(
        default="", metadata={"help": "Pinned revision of a Hub backbone."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of initialization, sampling and order."})
    precision: str = field(
        default="fp32",
        metadata={
            "help": "Of the frozen backbone while training: fp32; bf16 (far slower on CPUs that do "
            "not multiply it natively); or auto: bf16 where the hardware does. What learns, and "
            "all scores outside training, are fp32."
        },
    )
    offline: bool = field(default=False, metadata={"help": "Never look for a backbone online."})
    full_checkpoint: bool = field(
        default=True,
        metadata={"help": "Also write the full form: self-contained, as large as the backbone."},
    )
    rerun_changed: bool = field(
        default=False,
        metadata={"help": "Delete and retrain stages whose settings changed since they last ran."},
    )
    stages: list[Stage] = field(
        default_factory=list, metadata={"help": "The stages, in order (YAML only)."}
    )

    def __post_init__(self) -> None:
        """Turn stage mappings into `Stage` and check everything; raises `InputError`."""
        for spec in dataclasses.fields(self):
            if spec.name != "stages":
                value = getattr(self, spec.name)
                if value is None:
                    value = spec.default
                setattr(self, spec.name, read_value(f"recipe: `{spec.name}`", spec.type, value))
        if not isinstance(self.stages, list) or not self.stages:
            raise InputError("recipe: `stages` must be a list of at least one stage")
        self.stages = [_as_stage(stage, number) for number, stage in enumerate(self.stages, 1)]
        check_choice("recipe", "precision", self.precision, PRECISIONS)
        if not 0 <= self.seed < MOST_SEEDS:
            raise InputError(f"recipe: `seed` {self.seed} must be from 0 to {MOST_SEEDS - 1}")
        for key, file in (("data_dir", "protocol.json"), ("cf_dir", "cf_embeddings.safetensors")):
            self._check_folder(key, file)
        if not self.output_dir:
            raise InputError("recipe: `output_dir` is missing; name the folder of the run")
        self._check_stages()

    def needs_cf(self) -> bool:
        """Whether any stage reads the CF table."""
        return any(stage.reads_cf() for stage in self.stages)

    def _check_folder(self, key: str, file: str) -> None:
        folder = getattr(self, key)
        if not folder and key == "cf_dir" and not self.needs_cf():
            return
        if not folder:
            raise InputError(f"recipe: `{key}` is missing; name a folder that holds {file}")
        if not (Path(folder) / file).is_file():
            raise InputError(f"recipe: `{key}` {folder} has no {file}; make it or mend the path")

    def _check_stages(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise InputError(f"recipe: two stages are named {stage.name!r}; rename one")
            source = stage.init_from
            known = source in seen or Path(source).is_dir() or is_hub_repo(source)
            if source and not known:
                raise InputError(
                    f"stage {stage.name!r}: `init_from` {source!r} is neither an earlier stage, "
                    "nor a folder, nor a Hub repository (org/name or org/name@revision)"
                )
            seen.add(stage.name)


def is_hub_repo(source: str) -> bool:
    """Whether `source` reads `org/name` or `org/name@revision`, and is no mistyped path."""
    named = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*(@[\w./-]+)?", source)
    return bool(named and not Path(named[1]).is_dir())


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """Recipe from `--config recipe.yaml` and flag overrides.

    Raises `InputError` for an unreadable file, unknown keys and flags, and impossible values;
    `--help` ends the program.
    """
    parser = _RecipeParser([Recipe], prog="ccf-llm train", description=__doc__)  # type: ignore[list-item]
    _check_flags(parser, argv)
    words = list(argv)
    file = words[words.index("--config") + 1] if "--config" in words[:-1] else "of flags"
    try:
        if file in words:
            check_yaml(Path(file))
        recipe, *unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError(f"the recipe {file} cannot be read: {reason}") from problem
    if unknown[0]:
        known = ", ".join(sorted(f.name for f in dataclasses.fields(Recipe)))
        key = unknown[0][0].lstrip("-")
        raise InputError(f"recipe: the unknown key {key!r}; known keys are {known}")
    return recipe


def check_yaml(file: Path) -> None:
    """Refuse a file that is no mapping of names, or whose aliases stand for more values than any
    recipe has.

    Raises:
        ValueError, YAMLError: naming what is wrong with it.
    """
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it must contain a YAML mapping")
    for key, _ in root.value:
        if key.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"its key {key.value!r} is no name")
    sizes: dict[int, float] = {}
    if count_nodes(root, sizes) > MOST_NODES:
        raise ValueError(
            f"its aliases (*name) stand for more than {MOST_NODES:,} values: write them out"
        )


def count_nodes(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node of YAML stands for, each alias counted as what it repeats."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # of an alias inside what it stands for
        parts: list[yaml.Node] = []
        for child in node.value if isinstance(node, yaml.CollectionNode) else []:
            parts += child if isinstance(child, tuple) else [child]
        sizes[id(node)] = 1 + sum(count_nodes(part, sizes) for part in parts)
    return sizes[id(node)]


def _check_flags(parser: TrlParser, argv: Sequence[str]) -> None:
    """Refuse what no flag of the command takes, before any folder that the recipe names."""
    words = list(argv)
    if "--config" in words:
        place = words.index("--config")
        del words[place : place + 2]
    _, unknown = parser.parse_known_args(words)
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    if flag == "--config":
        raise InputError(f"two recipes are named, one of them {' '.join(unknown[1:2])}: give one")
    if not flag.startswith("--"):
        raise InputError(
            f"{flag} stands where a flag belongs: one recipe is taken, then --key value"
        )
    key = flag.lstrip("-")
    of_stage = {spec.name for spec in dataclasses.fields(Stage)}
    if key in of_stage or any(key in fields_of(section) for section in SECTIONS):
        raise InputError(
            f"{flag} is a setting of a stage, which no flag overrides: change it under `stages` in "
            "the recipe"
        )
    known = ", ".join(f"--{f.name}" for f in dataclasses.fields(Recipe) if f.name != "stages")
    raise InputError(f"{flag} is no setting of a recipe that a flag overrides: these are {known}")


class _RecipeParser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"recipe: {message}")


def _as_stage(stage: Any, number: int) -> Stage:
    if isinstance(stage, Stage):
        return stage
    if not isinstance(stage, Mapping):
        raise InputError(f"recipe: stage {number} must be a mapping of settings; got {stage!r}")
    known = {spec.name for spec in dataclasses.fields(Stage)}
    for key in sorted(str(key) for key in set(stage) - known):
        refuse_key(f"stage {stage.get('name', number)!r}", key)
    if "lora" in stage and stage["lora"] is None:
        raise InputError(
            f"stage {stage.get('name', number)!r}: `lora` is empty; write lora: {{}} for its "
            "defaults, or leave it out"
        )
    return Stage(**stage)


def check_choice(place: str, key: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        raise InputError(f"{place}: unknown `{key}` {value!r}; choose one of {', '.join(allowed)}")
