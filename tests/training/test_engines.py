"""Several processes by accelerate's configs train the weights of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.training.run import run_recipe
from ccf_llm_hf.training.sharding import shard_backbone
from ccf_llm_hf.training.trainer import check_engine, choose_trained

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "train.py"
CONFIGS = ROOT / "examples" / "accelerate_configs"


def write_recipe(settings: dict, output: Path) -> Path:
    training = {"labels_per_step": 32, "tokens_per_batch": 256, "eval_strategy": "steps"}
    stage = {
        "name": "joint",
        "lora": {},
        "model": {"cf_logit": True},
        "training": {**training, "eval_steps": 2},
    }
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(output), "stages": [stage]}))
    return file


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def launch(config: Path, recipe: Path, folder: Path) -> None:
    """`accelerate launch` with a config, on two CPU processes in place of its GPUs."""
    ours = yaml.safe_load(config.read_text())
    ours |= {"use_cpu": True, "num_processes": 2, "main_process_port": free_port()}
    if ours["num_machines"] > 1:
        ours |= {"main_process_ip": "127.0.0.1"}
    (folder / config.name).write_text(yaml.safe_dump(ours))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(folder / config.name)]
    runs = []
    for rank in range(ours["num_machines"]):
        runs.append(
            subprocess.Popen(
                [*command, "--machine_rank", str(rank), str(TRAIN), "--config", str(recipe)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def one_rank(settings, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    run_recipe(["--config", str(write_recipe(settings, output))])
    return output


@pytest.mark.parametrize("config", ["fsdp2.yaml", "multi_node.yaml"])
def test_two_ranks_save_what_one_does(one_rank, settings, tmp_path, config):
    output = tmp_path / "run"
    launch(CONFIGS / config, write_recipe(settings, output), tmp_path)
    report, alone = (
        json.loads((folder / "training.json").read_text()) for folder in (output, one_rank)
    )
    assert report["hardware"]["processes"] == 2
    assert report["validation"]["auc"] == pytest.approx(alone["validation"]["auc"], abs=1e-5)
    most = 0.0
    for file in ("fusion.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(folder / "checkpoint-slim" / file) for folder in (one_rank, output))
        for name, value in two.items():
            torch.testing.assert_close(value, one[name], rtol=0, atol=1e-5, msg=name)
            most = max(most, float((value - one[name]).abs().max()))
    print(config, "AUC", report["validation"]["auc"], "and", alone["validation"]["auc"])
    print("largest difference of a weight", most)
    for form in ("checkpoint", "checkpoint-slim"):
        assert CCFLLMForCTR.from_pretrained(output / form).config.architectures == ["CCFLLMForCTR"]


def test_what_is_frozen_is_shared_out_and_what_learns_is_whole(stage_run, tmp_path):
    run = stage_run(lora={})
    run.build_trainer()  # which names what learns, without a second process
    processor = run.build_processor()
    model = run.build_model(processor).eval()
    batch = processor(user="u1", history=["i1", "i2"], candidates=["i3", "i4", "i5"])
    with torch.no_grad():
        whole = model(**batch).logits
    choose_trained(model, fusion=True, lora=True)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shard_backbone(model, torch.device("cpu"), 1)
        backbone = dict(model.language_model.named_parameters())
        frozen = {name for name, weight in backbone.items() if not weight.requires_grad}
        shared = {name for name, weight in backbone.items() if isinstance(weight, DTensor)}
        assert shared == frozen
        learning = [weight for weight in model.parameters() if weight.requires_grad]
        assert learning and not any(isinstance(weight, DTensor) for weight in learning)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, whole)
        model.save_pretrained(tmp_path / "saved", form="slim")
    finally:
        torch.distributed.destroy_process_group()
    again = CCFLLMForCTR.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, whole)


@pytest.mark.parametrize("engine", [{"fsdp": "full_shard"}, {"deepspeed": "zero3.json"}])
def test_engines_that_share_out_what_learns_are_refused(engine):
    with pytest.raises(InputError, match=r"is not for this trainer: .*fsdp2\.yaml"):
        check_engine(SimpleNamespace(**engine))
