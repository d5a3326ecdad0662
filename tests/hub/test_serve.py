"""`ccf-llm serve`: what it refuses before it loads a model."""

import importlib.util
import socket
from typing import Any

import pytest

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub import serve
from ccf_llm_hf.inference import checkpoint


@pytest.fixture(autouse=True)
def packages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals are the same on a machine without them."""
    real = importlib.util.find_spec
    stub = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: stub if name in serve.NEEDED else real(name)
    )


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line that a refused command prints."""
    assert cli.main(["serve", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_without_its_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refusal(capsys, "org/model")
    assert line == ('error: serve needs starlette, which is missing: pip install "ccf-llm-hf[app]"')


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refusal(capsys, "org/model", "--port", str(port))
    assert line.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert line.endswith("choose another with --port")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(capsys: pytest.CaptureFixture[str], port: int) -> None:
    assert f"--port {port} is not a port" in refusal(capsys, "org/model", "--port", str(port))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_refused(
    capsys: pytest.CaptureFixture[str], host: str
) -> None:
    line = refusal(capsys, "org/model", "--host", host, "--port", "7999")
    assert host in line


def test_a_missing_checkpoint_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such/folder is not a folder" in refusal(capsys, "no/such/folder")


def test_it_serves_what_it_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(path: str, **options: Any) -> tuple[str, str]:
        seen.update(path=path, **options)
        return "model", "processor"

    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    monkeypatch.setattr(serve, "check_can_serve", lambda host, port: None)
    monkeypatch.setattr(serve, "serve", lambda *both, **where: seen.update(served=both, **where))
    assert cli.main(["serve", "org/model", "--backbone", "mine", "--port", "81"]) == 0
    assert seen == {
        "path": "org/model",
        "backbone": "mine",
        "served": ("model", "processor"),
        "host": "127.0.0.1",
        "port": 81,
    }


def test_a_free_port_passes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.check_can_serve("127.0.0.1", port)
    with pytest.raises(InputError, match="70000"):
        serve.check_can_serve("127.0.0.1", 70000)
