import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from prepared_folder import make_rows, write_prepared
from safetensors import SafetensorError

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.cli.train import train_and_describe
from ccf_llm_hf.errors import InputError


def run(capsys, *argv):
    """Exit code, stdout and stderr of one command."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_clear_line(result, *fragments):
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def test_ctrl_c_ends_a_command_in_one_line(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "rank", cli.COMMANDS["rank"]._replace(run=interrupted))
    code, out, err = run(capsys, "rank", "somewhere")
    assert (code, out) == (130, "")
    assert err == "interrupted: run the same command again to go on\n"


def test_overview_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<14}{command.summary}" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_flags_and_the_example(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"example:\n  ccf-llm {name} " in out
    assert "--json" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_example_parses(name):
    _, arguments, _ = cli.parse(shlex.split(cli.COMMANDS[name].example)[1:])
    assert arguments.json is False


def test_settings_come_from_the_config_dataclass(capsys):
    from ccf_llm_hf.data.config import PrepareConfig

    help_text = run(capsys, "prepare", "--help")[1]
    assert "--positive-threshold" in help_text
    assert PrepareConfig.__dataclass_fields__["name"].metadata["help"] in help_text


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ([], ["command"]),
        (["frobnicate"], ["frobnicate", "ccf-llm --help"]),
        (["prepare", "ml-1m", "--out", "x", "--frob"], ["--frob", "ccf-llm prepare --help"]),
        (["prepare", "netflix", "--out", "x"], ["netflix", "ml-1m"]),
        (["prepare", "ml-1m"], ["--out"]),
        (["train", "."], ["recipe . is a folder", "demo.yaml"]),
        (["train", "missing.yaml"], ["missing.yaml does not exist", "demo.yaml"]),
        (["fit-cf", "mf", "--data", "missing", "--out", "x"], ["missing", "ccf-llm prepare"]),
        (["fit-cf", "bpr", "--data", "x", "--out", "x"], ["'bpr'", "mf", "lightgcn", "sasrec"]),
        (["fit-cf", "mf", "--data", ".", "--out", "x", "--layers", "2"], ["--layers"]),
        (["fit-cf", "sasrec", "--data", ".", "--out", "x", "--heads", "3"], ["heads=3"]),
        (
            ["fit-cf", "mf", "--data", ".", "--out", "x", "--cross-fit", "user"],
            ["--cross-fit", "folds"],
        ),
        (
            ["evaluate", "org/model", "--data", "missing", "--out", "x"],
            ["--data missing is not a folder", "ccf-llm prepare"],
        ),
        (
            ["evaluate", "org/model", "--data", ".", "--split", "tset", "--out", "x"],
            ["--split", "'tset'", "validation"],
        ),
        (
            ["evaluate", "org/model", "--data", ".", "--out", "x", "--compare", "mf.parquet"],
            ["--compare mf.parquet is not NAME=PATH"],
        ),
        (
            ["evaluate", "org/model", "--data", ".", "--out", "x", "--compare", "mf=no.parquet"],
            ["no.parquet does not exist"],
        ),
        (["rank", "no/such/folder", "--user", "1"], ["no/such/folder is not a folder"]),
        (["rank", "typo", "--user", "1"], ["typo is not a folder"]),
        (["rank", "org/model", "--data", "."], ["add --user"]),
        (["rank", "org/model", "--user", "1", "--top-k", "ten"], ["--top-k", "'ten'"]),
        (["explain", "org/model", "--history", "1"], ["--item"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, fragments):
    assert_one_clear_line(run(capsys, *argv), *fragments)


def test_a_bad_override_of_a_recipe_is_one_line(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    assert_one_clear_line(run(capsys, "train", str(recipe), "--seed", "abc"), "--seed", "'abc'")


def test_an_input_error_inside_a_command_is_one_line(capsys, tmp_path):
    result = run(capsys, "rank", str(tmp_path), "--user", "1", "--data", str(tmp_path))
    assert_one_clear_line(result, str(tmp_path), "not a prepared folder")


def test_other_exceptions_keep_their_traceback(monkeypatch):
    def broken(arguments, rest):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "rank", cli.COMMANDS["rank"]._replace(run=broken))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["rank", "org/model", "--user", "1"])


def test_train_passes_overrides_on_and_keeps_stdout_clean(capsys, monkeypatch, tmp_path):
    seen = []
    result = {"checkpoint": str(tmp_path / "full"), "checkpoint_slim": str(tmp_path / "slim")}

    def fake(argv):
        seen.extend(argv)
        print("a library that prints")
        return result

    monkeypatch.setattr("ccf_llm_hf.cli.train.train_and_describe", fake)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    for named in ([str(recipe)], ["--config", str(recipe)]):
        seen.clear()
        code, out, err = run(capsys, "train", *named, "--seed", "3", "--json")
        assert code == 0
        assert json.loads(out) == result
        assert "a library that prints" in err
        assert seen == ["--config", str(recipe), "--seed", "3"]


@pytest.mark.parametrize("main_process", [True, False])
def test_train_writes_example_then_card_of_each_checkpoint(monkeypatch, tmp_path, main_process):
    steps = []
    outcome = {"checkpoint": "full", "checkpoint_slim": "slim", "minutes": 1}
    recipe = SimpleNamespace(data_dir="prepared", backbone=str(tmp_path), offline=True)

    def note(step, result=None):
        return lambda *given, **named: steps.append((step, *given, named)) or result

    for name, stand_in in {
        "accelerate.PartialState": lambda: SimpleNamespace(is_main_process=main_process),
        "ccf_llm_hf.training.run.run_recipe": note("train", outcome),
        "ccf_llm_hf.training.recipe.parse_recipe": lambda argv: recipe,
        "ccf_llm_hf.inference.checkpoint.load_checkpoint": note("load", ("model", "processor")),
        "ccf_llm_hf.hub.model_card.describe_run": note("describe"),
        "ccf_llm_hf.hub.example.record_example": note("record"),
    }.items():
        monkeypatch.setattr(name, stand_in)
    assert train_and_describe(["--config", "recipe.yaml"]) == outcome
    described = [
        ("load", "slim", {"backbone": str(tmp_path)}),
        ("record", "full", "model", "processor", {}),
        ("describe", "full", "prepared", {}),
        ("record", "slim", "model", "processor", {}),
        ("describe", "slim", "prepared", {}),
    ]
    assert steps == [("train", ["--config", "recipe.yaml"], {})] + described * main_process


def test_prepare_prints_json_and_writes_the_folder(capsys, tmp_path):
    table = tmp_path / "ratings.csv"
    rows = [f"u{n % 4},i{n % 7},Film {n % 7},{n % 5 + 1},{1_600_000_000 + n}" for n in range(60)]
    table.write_text("\n".join(["user_id,item_id,title,rating,timestamp", *rows]) + "\n")
    argv = ["prepare", "table", "--interactions", str(table), "--rating-column", "rating"]
    code, out, _ = run(capsys, *argv, "--out", str(tmp_path / "data"), "--json")
    assert code == 0
    document = json.loads(out)
    assert document["protocol"]["splits"]["train"]["rows"] == 48
    assert (tmp_path / "data" / "protocol.json").is_file()


def test_module_runs_as_a_script():
    finished = subprocess.run(
        [sys.executable, "-m", "ccf_llm_hf.cli", "train", "missing.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: recipe missing.yaml")


@pytest.mark.parametrize("model", ["mf", "lightgcn", "sasrec"])
def test_each_cf_model_has_its_own_settings(capsys, model):
    from ccf_llm_hf.cf.config import CF_CONFIGS

    code, out, _ = run(capsys, "fit-cf", model, "--help")
    assert code == 0
    for name in CF_CONFIGS[model].__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out
    assert ("--layers" in out) == (model == "lightgcn")
    argv = ["--data", "d", "--out", "o", "--dim", "3"]
    before, after = ["--json", model, *argv], [model, *argv, "--json"]
    for words, wanted in ((before, True), (after, True), ([model, *argv], False)):
        arguments = cli.parse(["fit-cf", *words])[1]
        assert (arguments.json, arguments.model, arguments.dim) == (wanted, model, 3)


def test_documented_fits_parse():
    text = (Path(__file__).parents[1] / "docs" / "cf.md").read_text(encoding="utf-8")
    commands = re.findall(r"`ccf-llm (fit-cf [^`.]+)`", text)
    fits = [shlex.split(command) for command in commands if "MODEL" not in command]
    models = [cli.parse(words)[1].model for words in fits]
    assert models == ["mf", "lightgcn", "sasrec"]


def test_fit_cf_fits_what_it_was_told(capsys, tmp_path):
    folder = write_prepared(tmp_path / "data", make_rows())
    argv = ["fit-cf", "lightgcn", "--data", str(folder), "--out", str(tmp_path / "cf")]
    argv += ["--layers", "1", "--l2", "1", "--learning-rate", "0.03", "--cross-fit", "folds"]
    code, out, _ = run(capsys, *argv, "--folds", "2", "--max-steps", "10", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["num_fits"], facts["layers"]) == (3, "1")
    assert float(facts["cross_fit_train_auc"]) > 0.5


def test_config_arguments_cover_the_field_types():
    from dataclasses import dataclass, field
    from typing import Literal

    from ccf_llm_hf.cli.arguments import (
        CommandParser,
        add_config_arguments,
        config_from_arguments,
    )

    @dataclass
    class Settings:
        rate: float = field(default=0.5, metadata={"help": "100% a rate"})
        steps: int | None = field(default=None, metadata={"help": "how many"})
        biases: bool = field(default=True, metadata={"help": "use biases"})
        kind: Literal["one", "two"] = field(default="one", metadata={"help": "which"})
        sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "sizes"})

    parser = CommandParser(prog="x")
    add_config_arguments(parser, Settings)
    assert "100% a rate (default: 0.5)" in parser.format_help()
    assert config_from_arguments(Settings, parser.parse_args([])) == Settings()
    words = shlex.split("--rate 1e-3 --steps 4 --no-biases --kind two --sizes 3 4 5")
    config = config_from_arguments(Settings, parser.parse_args(words))
    assert config == Settings(0.001, 4, False, "two", [3, 4, 5])
    with pytest.raises(InputError, match="--kind"):
        parser.parse_args(["--kind", "three"])


def test_a_mistyped_local_path_is_not_looked_up_on_the_hub(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    result = run(capsys, "rank", "runs/typo", "--user", "1")
    assert_one_clear_line(result, "runs/typo is not a folder")


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a.parquet")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (full_disk(), "runs/a.parquet has no space left"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "no s"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "runs/a cannot be read or"),
    ],
)
def test_a_disk_that_fills_is_one_line(capsys, monkeypatch, error, named):
    def broken(*_):
        try:
            raise error
        except Exception as first:
            raise first if isinstance(error, OSError) else RuntimeError("in passing") from first

    monkeypatch.setitem(cli.COMMANDS, "rank", cli.COMMANDS["rank"]._replace(run=broken))
    assert_one_clear_line(run(capsys, "rank", "somewhere"), named)


@pytest.mark.parametrize("flag", ["--out", "--metrics-out", "--plot"])
def test_evaluate_looks_at_its_outputs_first(capsys, tmp_path, flag):
    (tmp_path / "file").write_text("")
    argv = [
        "evaluate",
        str(tmp_path),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "s.parquet"),
    ]
    argv += [flag, str(tmp_path / "file" / "a.png")]
    assert_one_clear_line(run(capsys, *argv), "a.png cannot be written to (Not a directory)")
    argv[-1] = str(tmp_path)
    assert_one_clear_line(run(capsys, *argv), f"{flag} {tmp_path} is a folder: name a file in it")


def test_fit_cf_looks_at_its_output_first(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["fit-cf", "mf", "--data", str(tmp_path), "--out", str(tmp_path / "file" / "cf")]
    assert_one_clear_line(run(capsys, *argv), "cf cannot be written to (Not a directory)")
