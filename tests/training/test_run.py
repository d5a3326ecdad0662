import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ccf_llm_hf.errors import FolderInUse, InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.run import name_processor, run_recipe

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
SMALL = {"labels_per_step": 32, "tokens_per_batch": 512}
STAGES = [
    {"name": "text", "preset": "text_only", "lora": {}, "training": SMALL},
    {
        "name": "fusion",
        "init_from": "text",
        "lora": {},
        "training": {**SMALL, "eval_strategy": "steps", "eval_steps": 2},
    },
]


def write_recipe(settings: dict, output: Path, stages: list[dict]) -> list[str]:
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(output), "stages": stages}))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> tuple[Path, dict]:
    """A run of both stages, of a temperature that is not 1, and what it returned."""
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ccf_llm_hf.training.trainer.choose_temperature", lambda scores: 1.5)
        return output, run_recipe(write_recipe(settings, output, STAGES))


def trained_weights(slim: Path) -> dict[str, torch.Tensor]:
    return {
        **load_file(slim / "fusion.safetensors"),
        **load_file(slim / "adapter" / "adapter_model.safetensors"),
    }


def test_a_run_leaves_both_checkpoints_and_a_report(finished):
    output, result = finished
    report = json.loads((output / "training.json").read_text())
    assert report["validation"] == result["validation"]
    assert 0 <= result["validation"]["auc"] <= 1
    assert report["recipe"]["seed"] == 0
    assert list(report["stages"]) == ["text", "fusion"]
    assert report["versions"]["torch"] == torch.__version__
    for name in ("text", "fusion"):
        assert (output / "stages" / name / "curves.png").is_file()
    assert [report["stages"][name]["trains"] for name in ("text", "fusion")] == [
        ["lora"],
        ["fusion", "lora"],
    ]
    for form in ("checkpoint", "checkpoint-slim"):
        names = {file.name for file in (output / form).iterdir()}
        assert not names & {"README.md", "example.json"}, "training writes no card"
    leftovers = [*output.rglob("*partial*"), *output.rglob("optimizer.pt")]
    assert not leftovers


def test_both_forms_score_alike(finished):
    _, result = finished
    full = CCFLLMForCTR.from_pretrained(result["checkpoint"])
    slim = CCFLLMForCTR.from_pretrained(result["checkpoint_slim"])
    processor = CCFLLMProcessor.from_pretrained(result["checkpoint"])
    batch = processor(user="u1", history=["i1", "i2"], candidates=["i3", "i4", "i5"])
    with torch.no_grad():
        torch.testing.assert_close(full(**batch).logits, slim(**batch).logits)
    assert full.config.logit_temperature == slim.config.logit_temperature == 1.5


def test_run_again_trains_nothing(finished, settings):
    output, result = finished
    stamp = (output / "stages" / "fusion" / "stage.json").stat().st_mtime_ns
    assert run_recipe(write_recipe(settings, output, STAGES)) == result
    assert (output / "stages" / "fusion" / "stage.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("content", ["{", "[]", '{"finished": true}', '{"settings": 1}'])
def test_a_damaged_record_is_named_and_nothing_is_lost(settings, tmp_path, content):
    stage = tmp_path / "run" / "stages" / STAGES[0]["name"]
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(content)
    with pytest.raises(InputError, match=rf"stage.json is damaged: delete {stage} to have"):
        run_recipe(write_recipe(settings, tmp_path / "run", STAGES[:1]))
    assert (stage / "stage.json").read_text() == content


def test_a_changed_stage_is_refused_or_retrained(settings, tmp_path):
    stages = [{**STAGES[0], "training": {**SMALL, "num_train_epochs": 0.5}}]
    run_recipe(write_recipe(settings, tmp_path / "run", stages))
    changed = write_recipe(settings, tmp_path / "run", [{**stages[0], "lora": {"r": 2}}])
    with pytest.raises(InputError, match=r"another lora\.r; .*rerun_changed"):
        run_recipe(changed)
    run_recipe([*changed, "--rerun_changed", "true"])
    adapter = json.loads((tmp_path / "run/checkpoint-slim/adapter/adapter_config.json").read_text())
    assert adapter["r"] == 2


def test_what_a_kill_left_behind_the_last_record_is_taken_away(finished, settings):
    output, result = finished
    leftover = output / "stages" / "fusion" / "checkpoint-7"
    leftover.mkdir()
    (leftover / "optimizer.pt").write_text("")
    assert run_recipe(write_recipe(settings, output, STAGES)) == result
    assert not leftover.exists()


def test_no_full_checkpoint_of_an_earlier_recipe_stays(finished, settings, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    recipe = write_recipe(settings | {"full_checkpoint": False}, output, STAGES)
    assert "checkpoint" not in run_recipe(recipe)
    assert not (output / "checkpoint").exists() and (output / "checkpoint-slim").is_dir()


def test_weights_without_a_record_are_not_gone_on_from(finished, settings, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    (output / "stages" / "text" / "stage.json").unlink()
    recipe = write_recipe(settings, output, STAGES)
    with pytest.raises(InputError, match=r"text has weights and no stage\.json that says of what"):
        run_recipe(recipe)
    again = run_recipe([*recipe, "--rerun_changed", "true"])
    assert again["validation"] == finished[1]["validation"] | {"temperature": 1.0}


def test_a_cf_table_of_other_data_is_refused(settings, cf_dir, tmp_path):
    from ccf_llm_hf.cf.vectors import CFVectors

    CFVectors.from_tables({"u1": [1.0]}, {"i1": [1.0]}).save(tmp_path / "cf")
    recipe = write_recipe({**settings, "cf_dir": str(tmp_path / "cf")}, tmp_path / "run", STAGES)
    with pytest.raises(InputError, match=r"lack .* items"):
        run_recipe(recipe)


def test_snapshots_in_time_are_refused_for_data_without_times(settings, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(settings["data_dir"], data)
    protocol = json.loads((data / "protocol.json").read_text()) | {"has_times": False}
    (data / "protocol.json").write_text(json.dumps(protocol))
    recipe = write_recipe({**settings, "data_dir": str(data)}, tmp_path / "run", STAGES)
    with pytest.raises(InputError, match=r"snapshots in time, and .* without times"):
        run_recipe(recipe)


def test_two_ranks_train_the_weights_of_one(finished, settings, tmp_path):
    output, result = finished
    recipe = write_recipe(settings, tmp_path / "run", STAGES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", str(TRAIN), *recipe], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "training.json").read_text())
    assert report["hardware"]["processes"] == 2
    assert report["validation"]["auc"] == pytest.approx(result["validation"]["auc"], abs=1e-3)
    one = trained_weights(output / "checkpoint-slim")
    for name, value in trained_weights(tmp_path / "run" / "checkpoint-slim").items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-4, msg=name)


def test_the_example_reports_bad_input_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TRAIN), "--config", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\nmodel name\t: another\n",
            "AMD EPYC, cpu family 26, model 2",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", ""),
        (None, ""),
    ],
    ids=["named", "not named", "no listing"],
)
def test_name_processor_tells_generations_apart(tmp_path, monkeypatch, listing, expected):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("platform.processor", lambda: "")
    file = tmp_path / "cpuinfo"
    if listing is not None:
        file.write_text(listing)
    assert name_processor(file) == ", ".join(part for part in ("x86_64", expected) if part)


HOLD = """
import sys
from pathlib import Path
from ccf_llm_hf.io import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another_process():
    """Starts a process that holds a folder until it is killed."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_trains_in_is_refused(settings, tmp_path, another_process):
    output = tmp_path / "run"
    other = another_process(output)
    recipe = write_recipe(settings, output, STAGES[:1])
    with pytest.raises(FolderInUse, match=r"another process works in \S+/run now: wait until"):
        run_recipe(recipe)
    assert [file.name for file in output.iterdir()] == [".lock"]
    other.kill()  # without a chance to tidy up
    other.wait()
    assert 0 <= run_recipe(recipe)["validation"]["auc"] <= 1


def test_a_folder_that_cannot_be_made_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    for output, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            yaml.safe_dump({**settings, "output_dir": str(output), "stages": STAGES[:1]})
        )
        with pytest.raises(
            InputError, match=rf"output_dir {output} cannot be written to \({reason}"
        ):
            run_recipe(["--config", str(recipe)])
