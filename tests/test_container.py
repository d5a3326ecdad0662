"""Dockerfile and compose.yaml, without an engine to run them: what they name exists and fits."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml
from service_checkpoint import build_service_checkpoint

from ccf_llm_hf.cli.main import parse

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The file systems that a container has read-only and those that it has to itself.
READ_ONLY = """
mount --make-rprivate /
awk '{print $5}' /proc/self/mountinfo | sort -r | grep -Ev '^/(proc|sys|dev)' |
    while read -r at; do mount -o remount,bind,ro "$at" || exit 1; done
! touch "$1" 2>/dev/null || exit 1
shift
exec "$@"
"""


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def values(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def command() -> list[str]:
    """What a container runs."""
    return json.loads(values("ENTRYPOINT")[0]) + json.loads(values("CMD")[0])


def test_the_image_is_built_of_what_is_sent_to_the_engine() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {
        name
        for arguments in values("COPY")
        if not arguments.startswith("--from")
        for name in arguments.split()[:-1]
    }
    assert {f"!{name}" for name in copied} == {line for line in ignored if line[0] == "!"}
    assert all((ROOT / name).exists() for name in copied)
    needed = {
        folder.split("/")[0] for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values()
    }
    needed |= {PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    assert needed < copied
    (install,) = [arguments for arguments in values("RUN") if "pip install" in arguments]
    assert re.findall(r'"\.\[(\w+)\]"', install) == ["serve"]
    assert "serve" in PYPROJECT["project"]["optional-dependencies"]


def test_the_command_is_one_that_the_command_line_takes() -> None:
    program, *arguments = command()
    assert program in PYPROJECT["project"]["scripts"]
    _, read, _ = parse(arguments)
    assert (read.api, read.host, read.checkpoint) == (True, "0.0.0.0", "/checkpoint")
    assert values("EXPOSE") == [str(read.port)]
    assert f"127.0.0.1:{read.port}/health" in values("HEALTHCHECK")[0]
    assert "USER" in [name for name, _ in instructions()][-8:] and values("USER") != ["root"]


def test_the_parts_of_the_composition_fit() -> None:
    services, secrets = compose()["services"], compose()["secrets"]
    _, read, _ = parse(command()[1:])
    api = services["api"]
    assert api["read_only"] and api["tmpfs"] == ["/tmp"] and api["cap_drop"] == ["ALL"]
    assert api["ports"] == [f"127.0.0.1:{read.port}:{read.port}"]
    assert api["volumes"][0].endswith(f":{read.checkpoint}:ro")
    assert int(api["stop_grace_period"].removesuffix("s")) > read.timeout + 5
    here, there, _ = services["prometheus"]["volumes"][0].split(":")
    config = yaml.safe_load((ROOT / here).read_text())["scrape_configs"][0]
    assert there == "/etc/prometheus/prometheus.yml"
    assert config["static_configs"] == [{"targets": [f"api:{read.port}"]}]
    (secret,) = services["prometheus"]["secrets"]
    assert config["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert secrets[secret]["environment"] in api["environment"]


def can_mount() -> bool:
    """Whether this machine lets a process have read-only file systems of its own."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-m", "true"]).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="takes the right to mount")
def test_it_serves_where_nothing_but_a_folder_for_temporary_files_can_be_written(
    tmp_path: Path,
) -> None:
    checkpoint = build_service_checkpoint(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = [sys.executable, "-m", "ccf_llm_hf.cli", *command()[1:-1], str(checkpoint)]
    # By this machine's user, who can read the interpreter, but without any rights.
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    process = subprocess.Popen(
        [
            *("unshare", "-m", "sh", "-ec", READ_ONLY, "sh", str(tmp_path / "x")),
            *(*drop, *served, "--port", str(port)),
        ],
        env={
            "HOME": "/nonexistent",
            "TMPDIR": "/dev/shm",
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        log = []
        for line in process.stderr:
            log.append(line)
            if line.startswith("the API is at"):
                break
        assert process.poll() is None, "".join(log)
        asked = Request(
            f"http://127.0.0.1:{port}/explain",
            json.dumps({"history": ["Carrie"], "item": "Dune"}).encode(),
            {"content-type": "application/json"},
        )
        with urlopen(asked) as answer:
            assert json.load(answer)["title"] == "Dune"
        assert not (tmp_path / "x").exists()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
