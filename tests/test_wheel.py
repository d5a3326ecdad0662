"""The wheel holds all that the package needs, and carries the version that every file names."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from ccf_llm_hf.version import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src", "modeling", "hub_cards")
CHECK = """
from importlib.resources import files
from pathlib import Path

import ccf_llm_hf
from ccf_llm_hf.cli.main import main
from ccf_llm_hf.evaluation import metric_path
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES

package = Path(ccf_llm_hf.__file__).parent
print(package.parent, ccf_llm_hf.__version__)
assert all((package / "modeling" / name).is_file() for name in CODE_FILES)
assert files("ccf_llm_hf.hub_cards").joinpath("model_card.md.jinja").is_file()
assert Path(metric_path("uauc")).exists()
main(["--help"])
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, built of the sources alone."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.startswith(f"ccf_llm_hf-{__version__}-py3-none-any")
    run(*pip, "install", "--no-deps", "--target", target, wheel)
    return target


def test_the_installed_wheel_works_away_from_the_clone(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(CHECK)
    printed = run(sys.executable, tmp_path / "check.py", PYTHONPATH=str(installed))
    assert printed.splitlines()[0] == f"{installed} {__version__}"
    assert (installed / "bin" / "ccf-llm").is_file()


def test_every_file_that_names_the_version_names_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes is not None
    assert {project["version"], citation["version"], changes[1]} == {__version__}
