"""Broken inputs, each with the exact sentence that it gets."""

from pathlib import Path

import pytest
import yaml
from bad_input.readers import Readers, refuse

CORPUS = sorted(Path(__file__).parent.glob("*.yaml"))


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_every_broken_input_gets_its_sentence(readers: Readers, file: Path, tmp_path: Path) -> None:
    reader = getattr(readers, file.stem)
    cases = yaml.safe_load(file.read_text(encoding="utf-8"))
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        said = refuse(reader, case["given"], folder)
        assert said is not None, f"{case['given']} is taken"
        assert said.replace(str(folder), "FOLDER") == case["sentence"], case["given"]
