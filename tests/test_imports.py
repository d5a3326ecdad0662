"""Who imports whom: the diagram in CONTRIBUTING.md is what the modules do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ccf_llm_hf"
TOP = "__init__"  # as the diagram calls the package's own file


def modules() -> dict[str, Path]:
    """Dotted name to file; a package is its `__init__`."""
    found = {}
    for name, folder in ((PACKAGE, ROOT / "src" / PACKAGE), (f"{PACKAGE}.modeling", "modeling")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that a file does, those inside functions too; not those of Hub code that only
    type checkers and transformers' list of files to fetch read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unread = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
        if isinstance(node, ast.ImportFrom) and node.level
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in unread:
            yield node


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports from."""
    found = set()
    for node in statements(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        source = node.module or ""
        if node.level:
            here = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
            parents = here.split(".")[: len(here.split(".")) - node.level + 1]
            source = ".".join(filter(None, (*parents, node.module)))
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            found.add(inner if inner in MODULES else source)
    return {source for source in found if source.split(".")[0] == PACKAGE}


def part(name: str) -> str:
    """What the diagram calls a module: its package, or itself where it is in none."""
    return name.split(".")[1] if "." in name else TOP


def diagram() -> tuple[dict[str, set[str]], set[str]]:
    """The arrows of CONTRIBUTING.md, and what lies below all."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ +(\w+) +-> (.+)$", text, re.MULTILINE)
    arrows = {source: set(targets.split(", ")) for source, targets in lines}
    return arrows, arrows.pop("all")


def test_the_arrows_are_those_of_the_diagram() -> None:
    arrows, below_all = diagram()
    drawn = {(source, target) for source, targets in arrows.items() for target in targets}
    lines: dict[tuple[str, str], set[str]] = {}
    for name in MODULES:
        for source in imported(name):
            if part(source) not in {part(name), *below_all}:
                lines.setdefault((part(name), part(source)), set()).add(f"{name} -> {source}")
    assert {arrow: lines[arrow] for arrow in lines.keys() - drawn} == {}, "not in the diagram"
    assert drawn - lines.keys() == set(), "in the diagram, but nothing imports that way"


def test_the_diagram_runs_one_way() -> None:
    arrows, below_all = diagram()
    parts = set(TopologicalSorter(arrows).static_order())
    assert not below_all & parts and TOP in parts


@pytest.mark.parametrize("name", ["io", "errors", "version"])
def test_what_lies_below_all_imports_nothing_above(name: str) -> None:
    assert name in diagram()[1]
    assert {part(source) for source in imported(f"{PACKAGE}.{name}")} <= diagram()[1]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imported(name) - {name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_importing_registers_whatever_the_command_is_called(tmp_path: Path) -> None:
    script = tmp_path / "ccf-llm"
    script.write_text(
        "import ccf_llm_hf\n"
        "from transformers import AutoConfig, pipelines\n"
        "print(type(AutoConfig.for_model('ccf_llm')).__name__)\n"
        "print('ctr-ranking' in pipelines.PIPELINE_REGISTRY.get_supported_tasks())\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["CCFLLMConfig", "True"]


def test_every_package_is_installed() -> None:
    """What pyproject.toml does not list is missing from a wheel."""
    listed = re.findall(rf'^  "({PACKAGE}[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert packages <= set(listed)
