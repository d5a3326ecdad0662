from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input.readers import Readers
from films import build_checkpoint


@pytest.fixture(scope="session")
def readers(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    backbone_folder: Callable[[str], Path],
) -> Readers:
    folder = tmp_path_factory.mktemp("films")
    return Readers(build_checkpoint(folder, tokenizer_folder, backbone_folder("llama"), False))
