"""The examples that train, on the tiny world."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ccf_llm_hf import CCFLLMForCTR, CTRRanker, CTRTrainingArguments

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_train_leaves_a_checkpoint_that_ranks(settings, tmp_path):
    train = load("train")
    inputs = train.Inputs(settings["data_dir"], settings["cf_dir"], settings["backbone"])
    args = CTRTrainingArguments(output_dir=str(tmp_path), labels_per_step=64)
    metrics = train.train(inputs, args)
    assert 0 <= metrics["eval_auc"] <= 1
    assert CCFLLMForCTR.from_pretrained(tmp_path).config.lora["r"] == 8
    assert CTRRanker.from_pretrained(str(tmp_path)).rank(user="u1", history=["i1"], top_k=2)


def test_train_takes_flags_or_refuses_them_in_one_line(settings, tmp_path):
    command = [sys.executable, str(EXAMPLES / "train.py"), "--output_dir", str(tmp_path)]
    for name in ("data_dir", "cf_dir", "backbone"):
        command += [f"--{name}", settings[name]]
    flags = ["--max_steps", "2", "--learning_rate_mapping", '{"lora_": 1e-3}']
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eval_auc" in json.loads(done.stdout[done.stdout.index("{\n") :])
    done = subprocess.run(
        [*command, "--per_device_train_batch_size", "8"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: per_device_train_batch_size=8: the")


def test_own_table_goes_from_ratings_to_a_ranked_list(backbone, tmp_path, capsys):
    own_table = load("own_table")
    table = own_table.invent_table(tmp_path / "ratings.csv", users=16)
    ranker = own_table.build(table, tmp_path / "out", str(backbone))
    assert "test AUC" in capsys.readouterr().out
    likes = ranker.processor.item_titles[:2]
    ranked = ranker.rank(history=likes, top_k=5)
    assert len(ranked) == 5
    assert not {item.title for item in ranked} & set(likes)
    saved = CTRRanker.from_pretrained(str(tmp_path / "out" / "checkpoint"))
    again = saved.rank(history=likes, candidates=[item.title for item in ranked])
    for item, other in zip(ranked, again, strict=True):
        assert item.title == other.title
        assert item.logit == pytest.approx(other.logit, abs=1e-4)
