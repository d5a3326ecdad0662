import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ccf_llm_hf.errors import FolderInUse, InputError
from ccf_llm_hf.io import (
    check_writable,
    lock_folder,
    lock_output,
    sha256_of,
    write_file,
    write_files,
    write_folder,
    write_json,
)


def write_halves_and_fail(path: Path) -> None:
    """A file, or a folder of one, that a full disk cuts short."""
    (path / "half" if path.is_dir() else path).write_text("half")
    raise OSError("no space left")


def listing(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"title": "Amélie"})
    before = listing(tmp_path / "new")
    assert before == {"a.json": '{\n  "title": "Amélie"\n}\n'}
    with pytest.raises(OSError, match="no space left"):
        write_file(tmp_path / "new" / "a.json", write_halves_and_fail)
    assert listing(tmp_path / "new") == before


def test_the_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    suffixes = []
    write_file(tmp_path / "plot.png", lambda partial: suffixes.append(partial.suffix))
    assert suffixes == [".png"]


@pytest.mark.parametrize("write", [write_files, write_folder])
def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, write) -> None:
    folder = tmp_path / "folder"
    write(folder, lambda new: (new / "a").write_text("old"))
    with pytest.raises(OSError, match="no space left"):
        write(folder, write_halves_and_fail)
    assert listing(folder) == {"a": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert [entry.name for entry in folder.iterdir()] == ["a"]


def test_a_folder_is_replaced_and_files_are_put_beside_others(tmp_path: Path) -> None:
    for name in ("replaced", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other").write_text("other")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "replaced")
    write_folder(link, lambda new: (new / "a").write_text("new"))
    assert link.is_symlink() and listing(tmp_path / "replaced") == {"a": "new"}
    write_files(tmp_path / "kept", lambda new: (new / "a").write_text("new"))
    assert listing(tmp_path / "kept") == {"a": "new", "other": "other"}


def test_tensors_follow_the_umask_as_text_does(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a.safetensors", lambda partial: save_file(tensors, partial))
        for write in (write_files, write_folder):
            write(tmp_path / write.__name__, lambda new: save_file(tensors, new / "a.safetensors"))
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*.safetensors"))
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o640"] * 3
    assert torch.equal(load_file(files[0])["a"], tensors["a"])


def test_the_digest_is_of_contents_in_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    known = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"  # sha256 of "ab"
    assert sha256_of([tmp_path / "a", tmp_path / "b"]) == known
    assert sha256_of([tmp_path / "b", tmp_path / "a"]) != known


def test_json_has_no_value_that_other_readers_refuse(tmp_path: Path) -> None:
    numbers = {"nan": float("nan"), "inf": -np.inf, "half": np.float32(0.5), "three": np.int64(3)}
    write_json(tmp_path / "a.json", {"all": [numbers], "true": True, "none": None})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    numbers = {"nan": None, "inf": None, "half": 0.5, "three": 3}
    assert found == {"all": [numbers], "true": True, "none": None}


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "folder" / "a.json")
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with pytest.raises(InputError, match=r"file/a\.json cannot be written to \(Not a directory\)"):
        check_writable(tmp_path / "file" / "a.json")

    def fill(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(InputError, match=r"a\.json cannot be written to \(No space left"):
        check_writable(tmp_path / "a.json")


def test_a_lock_is_one_processs_and_takes_away_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in (".partial-7-a.json", "kept"):
        (tmp_path / name).write_text("")
    (tmp_path / ".partial-checkpoint" / "inner").mkdir(parents=True)
    with lock_folder(tmp_path):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "kept"]
        with pytest.raises(FolderInUse, match="another process works in"), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass


def test_an_output_has_one_writer_and_no_lock_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with lock_output(out):
        with pytest.raises(FolderInUse, match=f"another process works in {out}"), lock_output(out):
            pass
        write_folder(out, lambda new: (new / "a").write_text("a"))
    with lock_output(out):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
