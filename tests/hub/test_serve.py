"""`ccf-llm serve`: what it refuses before it loads a model."""

import importlib.util
import socket
from typing import Any

import pytest

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub import serve
from ccf_llm_hf.inference import checkpoint
from ccf_llm_hf.inference.ranker import CTRRanker

PACKAGES = [name for names in serve.NEEDED.values() for name in names]


def find_all_but(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Have all that serving needs be there, but for some."""
    real = importlib.util.find_spec
    found = dict.fromkeys(PACKAGES, real("json")) | dict.fromkeys(missing)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found[name] if name in found else real(name)
    )


@pytest.fixture(autouse=True)
def all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals are the same on a machine without the extras."""
    find_all_but(monkeypatch)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line that a refused command prints."""
    assert cli.main(["serve", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "package", "extra"),
    [
        ((), "starlette", "app"),
        ((), "rapidfuzz", "app"),
        (("--api",), "fastapi", "serve"),
        (("--api",), "uvicorn", "serve"),
        (("--api",), "prometheus_client", "serve"),
    ],
)
def test_without_a_package_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    package: str,
    extra: str,
) -> None:
    find_all_but(monkeypatch, package)
    line = refusal(capsys, "org/model", *flags)
    assert line == (
        f'error: serve needs {package}, which is missing: pip install "ccf-llm-hf[{extra}]"'
    )


def test_the_api_needs_no_rapidfuzz_and_the_page_no_prometheus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    find_all_but(monkeypatch, "rapidfuzz")
    serve.check_can_serve("127.0.0.1", port, "serve")
    find_all_but(monkeypatch, "prometheus_client")
    serve.check_can_serve("127.0.0.1", port, "app")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--max-waiting", "0"), "--max-waiting 0 lets none wait: give 1 or more"),
        (("--timeout", "0"), "--timeout 0 is no time: give seconds above 0"),
        (("--timeout", "nan"), "--timeout nan is no time: give seconds above 0"),
    ],
)
def test_a_service_that_would_answer_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    assert refusal(capsys, "org/model", "--api", *flags) == f"error: {sentence}"


@pytest.mark.parametrize("token", ["", " ", "a b", "a\n", "\u00fc"])
def test_a_token_that_no_header_carries_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("CCF_LLM_TOKEN", token)
    line = refusal(capsys, "org/model", "--api", "--port", "0")
    assert "--port 0" in line  # the port is looked at first
    monkeypatch.setattr(serve, "check_can_serve", lambda *where: None)
    assert "CCF_LLM_TOKEN is empty or has" in refusal(capsys, "org/model", "--api")


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
    monkeypatch.setattr(serve, "check_can_serve", lambda *where: None)
    monkeypatch.setattr(serve, "serve", lambda *both, **where: seen.update(served=both, **where))
    assert cli.main(["serve", "org/model", "--backbone", "mine", "--port", "81"]) == 0
    assert seen == {
        "path": "org/model",
        "backbone": "mine",
        "served": ("model", "processor"),
        "host": "127.0.0.1",
        "port": 81,
    }


def test_the_api_gets_a_ranker_the_token_and_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(serve, "check_can_serve", lambda *where: seen.update(checked=where))
    monkeypatch.setattr(
        CTRRanker, "from_pretrained", lambda path, **options: (path, options["backbone"])
    )
    monkeypatch.setattr(serve, "serve_api", lambda ranker, **rest: seen.update(rest, ranker=ranker))
    monkeypatch.setenv("CCF_LLM_TOKEN", "secret")
    flags = ("--api", "--port", "81", "--max-waiting", "3", "--timeout", "1.5")
    assert cli.main(["serve", "org/model", "--backbone", "mine", *flags]) == 0
    assert seen == {
        "checked": ("127.0.0.1", 81, "serve"),
        "ranker": ("org/model", "mine"),
        "host": "127.0.0.1",
        "port": 81,
        "token": "secret",
        "max_waiting": 3,
        "timeout": 1.5,
    }


def test_a_free_port_passes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.check_can_serve("127.0.0.1", port, "app")
    with pytest.raises(InputError, match="70000"):
        serve.check_can_serve("127.0.0.1", 70000, "app")
