"""The code that a checkpoint carries: what it may import, and how it is pinned."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.loopback import LoopbackHub
from huggingface_hub import CommitOperationAdd, HfApi
from tiny import BuildModel
from transformers import AutoModel, AutoProcessor, pipeline

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor, CTRRanker
from ccf_llm_hf.modeling import checkpoint_ccf_llm
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES

MODELING = Path(checkpoint_ccf_llm.__file__).parent
ALLOWED = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
SHIPPED = sorted(path.name for path in MODELING.glob("*.py") if path.name != "__init__.py")
CALL = {"user": "u0", "history": ["i1", "i2"], "candidates": ["i0", "i3", "A new film (2024)"]}


def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def problem(node: ast.Import | ast.ImportFrom, top_level: bool) -> str | None:
    """What is wrong with an import in remote code, which transformers copies file by file."""
    if isinstance(node, ast.ImportFrom) and node.level:
        flat = node.level == 1 and node.module is not None and f"{node.module}.py" in CODE_FILES
        if not flat:
            return "a relative import must be `from .shipped_file import Name`"
        return None if top_level else "a relative import must stand at the top of its module"
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
    foreign = {name.split(".")[0] for name in names} - ALLOWED
    return f"imports {', '.join(sorted(foreign))}" if foreign else None


def problems(source: str) -> list[str]:
    tree = ast.parse(source)
    typed = [
        statement
        for branch in tree.body
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
    ]
    top = [*tree.body, *typed]
    found = [(node.lineno, problem(node, node in top)) for node in imports(tree)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    dynamic = {"__import__", "import_module", "exec", "eval"}
    for call in calls:
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        # `.eval()` is what switches a model; the builtin takes an argument.
        if name in dynamic and (name != "eval" or call.args):
            found.append((call.lineno, f"calls {name}, past which imports cannot be read"))
    return [f"line {line}: {text}" for line, text in found if text]


def test_every_file_is_shipped() -> None:
    assert sorted(CODE_FILES) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_code_imports_torch_transformers_safetensors_and_the_standard_library(
    name: str,
) -> None:
    assert problems((MODELING / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy as np", "imports numpy"),
        ("def f():\n    from peft import LoraConfig", "imports peft"),
        ("import ccf_llm_hf.modeling", "imports ccf_llm_hf"),
        ("from . import attention_ccf_llm", "from .shipped_file import"),
        ("from .nowhere import A", "from .shipped_file import"),
        ("from ..attention_ccf_llm import A", "from .shipped_file import"),
        ("def f():\n    from .attention_ccf_llm import additive", "top of its module"),
        ("import importlib\nimportlib.import_module('numpy')", "calls import_module"),
        ("eval('1')", "calls eval"),
    ],
)
def test_the_check_finds_what_a_hub_user_would_trip_over(source: str, expected: str) -> None:
    (found,) = problems(source)
    assert expected in found
    assert problems("import torch\nfrom .attention_ccf_llm import additive\nmodel.eval()") == []


LOAD = """
import json, sys
sys.modules["ccf_llm_hf"] = None  # importing it fails
import torch
from transformers import AutoModel, AutoProcessor
repo, pins, call = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
pins["trust_remote_code"] = True
model = AutoModel.from_pretrained(repo, **pins)
processor = AutoProcessor.from_pretrained(repo, **pins)
with torch.no_grad():
    logits = model(**processor(**call)).logits.tolist()
marks = [getattr(sys.modules[type(part).__module__], "MARK", None) for part in (model, processor)]
marks.append(getattr(sys.modules[type(model.config).__module__], "MARK", None))
print("FOUND", json.dumps([marks, logits]))
"""


def load(hub: LoopbackHub, home: Path, **pins: str) -> tuple[list[str], torch.Tensor]:
    """Marks in the code of model, processor and config, and logits, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD, "acme/films", json.dumps(pins), json.dumps(CALL)],
        env=os.environ | hub.environment(home, token="hf_bob"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    marks, logits = json.loads(run.stdout.split("FOUND ")[1])
    return marks, torch.tensor(logits)


def marked_code(folder: Path, mark: str) -> list[CommitOperationAdd]:
    """The checkpoint's code with a constant that tells its revision."""
    return [
        CommitOperationAdd(name, (folder / name).read_bytes() + f"\nMARK = {mark!r}\n".encode())
        for name in CODE_FILES
    ]


def test_code_is_pinned_with_the_weights_or_apart_from_them(
    build: BuildModel, tmp_path: Path, hub: LoopbackHub
) -> None:
    api = HfApi(endpoint=hub.url, token="hf_ada")
    api.create_repo("acme/films", private=True)
    model, processor = build(cf_logit=True)
    expected = []
    commits = []
    for mark, scale in (("old", 1.0), ("new", 2.0)):
        model.cf_logit_scale.data.fill_(scale)
        folder = tmp_path / mark
        model.save_pretrained(folder, form="full")
        processor.save_pretrained(folder)
        files = [path for path in folder.iterdir() if path.name not in CODE_FILES]
        operations = [CommitOperationAdd(path.name, path) for path in files]
        operations += marked_code(folder, mark)
        commits.append(api.create_commit("acme/films", operations, commit_message=mark).oid)
        with torch.no_grad():
            expected.append(model(**processor(**CALL)).logits)
    old, new = commits
    assert not torch.allclose(*expected)

    marks, logits = load(hub, tmp_path / "home", revision=new, code_revision=old)
    assert marks == ["old"] * 3
    torch.testing.assert_close(logits, expected[1], atol=1e-5, rtol=0)
    marks, logits = load(hub, tmp_path / "home", revision=old)
    assert marks == ["old"] * 3, "without code_revision, revision pins the code too"
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=0)
    assert load(hub, tmp_path / "home")[0] == ["new"] * 3


def test_with_the_package_installed_the_repositorys_code_is_not_run(
    build: BuildModel, tmp_path: Path
) -> None:
    model, processor = build()
    model.save_pretrained(tmp_path, form="full")
    processor.save_pretrained(tmp_path)
    for name in CODE_FILES:
        (tmp_path / name).write_text("raise RuntimeError('the repository's code was run')\n")
    trusting = {"trust_remote_code": True}
    loaded = AutoModel.from_pretrained(tmp_path, **trusting)
    assert type(loaded) is CCFLLMForCTR
    again = AutoProcessor.from_pretrained(tmp_path, **trusting)
    assert type(again) is CCFLLMProcessor
    expected = CTRRanker.from_pretrained(str(tmp_path)).rank(history=["i1"], candidates=["i2"])
    ranked = pipeline("ctr-ranking", model=loaded, processor=again)(
        {"history": ["i1"], "candidates": ["i2"]}
    )
    assert ranked[0]["logit"] == pytest.approx(expected[0].logit, abs=1e-5)
