"""Checkpoints load and score alike under the transformers releases that a card calls tested.

Each release gets a virtual environment of its own: pip installs that transformers, and of its
dependencies only those whose installed version will not do; all else comes from this environment.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import BACKBONES, BuildModel

from ccf_llm_hf.hub.model_card import REQUIREMENTS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PROJECT = CONSTRAINTS.with_name("pyproject.toml")
# The newest one and the oldest one that pyproject.toml allows; between them lies that in there,
# which all other tests run with.
RELEASES = ("5.24.0", "5.20.2")
CALL = {
    "user": "u0",
    "history": ["i1", "i2", "i7"],
    "candidates": ["i0", "i3", "i7", "A new film (2024)"],
}
LOAD = """
import json, sys, warnings
warnings.simplefilter("error", FutureWarning)  # what the next releases will not take
sys.modules.update(dict.fromkeys(("ccf_llm_hf", "peft", "accelerate")))  # importing them fails
import torch, transformers
from transformers import AutoModel, AutoModelForSequenceClassification, AutoProcessor, pipeline
jobs, call = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {"transformers": transformers.__version__, "torch": torch.__version__, "scores": {}}
for folder, kwargs in jobs.items():
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        model = auto.from_pretrained(folder, trust_remote_code=True, **kwargs)
    with torch.no_grad():
        logits = model(**processor(**call)).logits[0]
    ranker = pipeline("ctr-ranking", model=folder, model_kwargs=kwargs, trust_remote_code=True)
    ranked = ranker(call)
    rank = sys.modules[type(ranker).__module__].rank  # in parts, on cached keys and values
    (cached,) = rank(ranker.model, processor, [ranker.preprocess(call)[0]], tokens_per_batch=8)
    found["scores"][folder] = [logits.tolist(), [item["logit"] for item in ranked]]
    found["scores"][folder].append([item.logit for item in cached])
print("FOUND", json.dumps(found))
"""


@dataclass
class Saved:
    """A checkpoint, what loading it takes, and its logits before it was saved."""

    folder: Path
    options: dict[str, str]
    logits: torch.Tensor


@pytest.fixture
def checkpoints(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> list[Saved]:
    """Full ones over every backbone family, and slim ones with LoRA."""
    saved = []
    for form, backbones in (("full", BACKBONES), ("slim", ("llama", "gpt2"))):
        for backbone in backbones:
            model, processor = build(
                backbone=backbone, lora=True, cf_logit=True, logit_temperature=1.5
            )
            folder = tmp_path / f"{form}-{backbone}"
            with torch.no_grad():
                logits = model(**processor(**CALL)).logits[0]
            model.save_pretrained(folder, form=form)
            processor.save_pretrained(folder)
            options = {"backbone": str(backbone_folder(backbone))} if form == "slim" else {}
            saved.append(Saved(folder, options, logits))
    return saved


@pytest.fixture
def environments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for virtual environments, deleted afterwards: each takes a hundred megabytes."""
    folder = tmp_path_factory.mktemp("environments")
    yield folder
    shutil.rmtree(folder)


def make_environment(folder: Path, release: str) -> Path:
    """The Python of a new environment with this transformers; skips where pip has no registry."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # After its own packages, it sees those of this environment, but none of their .pth files, so
    # neither this package when that is installed in editable mode.
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    command += ["--retries", "1", f"transformers=={release}"]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if "(from versions: none)" in installed.stderr:
        pytest.skip(f"pip reaches no registry that has transformers {release}")
    assert installed.returncode == 0, installed.stderr[-2000:]
    return python


def requirement(name: str) -> tuple[int, int]:
    return minor(REQUIREMENTS[name])


def minor(version: str) -> tuple[int, int]:
    first, second = version.split(".")[:2]
    return int(first), int(second)


def test_the_releases_go_from_the_oldest_supported_on_which_the_card_names() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    newest, oldest = map(minor, RELEASES)
    assert oldest < minor(pins["transformers"]) <= newest
    assert f'"transformers>={oldest[0]}.{oldest[1]},' in PROJECT.read_text()
    assert requirement("transformers") == oldest
    for name in ("torch", "safetensors"):
        assert requirement(name) == minor(pins[name])


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_checkpoints_score_alike_under_another_transformers(
    checkpoints: list[Saved], environments: Path, tmp_path: Path, release: str
) -> None:
    python = make_environment(environments / release, release)
    jobs = {str(saved.folder): saved.options for saved in checkpoints}
    run = subprocess.run(
        [str(python), "-c", LOAD, json.dumps(jobs), json.dumps(CALL)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.split("FOUND ")[1])
    assert found["transformers"] == release
    assert found["torch"] == torch.__version__
    for saved in checkpoints:
        name = saved.folder.name
        logits, *ranked = (torch.tensor(values) for values in found["scores"][str(saved.folder)])
        best = saved.logits.sort(descending=True).values
        for scores, expected in ((logits, saved.logits), *((one, best) for one in ranked)):
            difference = (scores - expected).abs().max().item()
            assert difference <= 1e-5, f"{name} differs by {difference}"
