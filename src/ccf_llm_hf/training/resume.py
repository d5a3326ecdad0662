"""Trainer checkpoints in a folder: the last whole one, going on from it, taking them away."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ccf_llm_hf.training.trainer import CTRTrainer

logger = logging.get_logger(__name__)


def train_or_resume(trainer: CTRTrainer) -> list[dict[str, float]]:
    """Train, going on from the last whole trainer checkpoint if there is one.

    Returns:
        The log history of the whole run. The model carries the best weights.
    """
    folder = Path(str(trainer.args.output_dir))
    try:
        return _train_on(trainer, last_checkpoint(folder))
    except Exception:
        for checkpoint in trainer_checkpoints(folder):  # of a disk that filled, say
            if trainer.args.should_save and not is_whole(checkpoint):
                shutil.rmtree(checkpoint)
        raise


def _train_on(trainer: CTRTrainer, checkpoint: Path | None) -> list[dict[str, float]]:
    if checkpoint is None:
        trainer.train()
        return trainer.state.log_history
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = state.stateful_callbacks["TrainerControl"]["args"]
    if state.global_step < state.max_steps and not control["should_training_stop"]:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer.state = state
        trainer.load_best()
    return trainer.state.log_history


def last_checkpoint(folder: Path) -> Path | None:
    """The latest trainer checkpoint that was written to its end; None when there is none."""
    for checkpoint in sorted(trainer_checkpoints(folder), key=_step, reverse=True):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning(
            "%s was not written to its end, or is damaged: training goes on from before it.",
            checkpoint / TRAINER_STATE_NAME,
        )
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a trainer checkpoint was written to its end: its state is, which comes last."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        callbacks: Any = TrainerState(**state).stateful_callbacks
        return bool(callbacks["TrainerControl"]["args"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def delete_trainer_checkpoints(folder: Path) -> None:
    """Delete the trainer's checkpoints: optimizer states, of no use once a stage is finished."""
    for checkpoint in trainer_checkpoints(folder):
        shutil.rmtree(checkpoint)


def trainer_checkpoints(folder: Path) -> list[Path]:
    """Folders that a trainer saved in `folder`, whole or not, in no order."""
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])
