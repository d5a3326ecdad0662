from collections.abc import Callable
from pathlib import Path

import pytest

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.data.prepared import INTERACTIONS_FILE, ITEMS_FILE, split_file
from ccf_llm_hf.errors import InputError

Make = Callable[..., PrepareConfig]


def test_a_folder_that_is_not_prepared(tmp_path: Path) -> None:
    for load in (load_prepared, interactions):
        with pytest.raises(InputError, match="is not a prepared folder"):
            load(tmp_path / "nowhere")
    (tmp_path / "protocol.json").write_text("{broken")
    with pytest.raises(InputError, match="is not a prepared folder"):
        load_prepared(tmp_path)
    (tmp_path / "protocol.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="is not of format ccf-llm-prepared-2"):
        load_prepared(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("name", [split_file("test"), ITEMS_FILE, INTERACTIONS_FILE])
def test_a_damaged_file_is_named(name: str, damage: str, prepared_config: Make) -> None:
    out = prepare(prepared_config(), summary=False)
    content = (out / name).read_bytes()
    (out / name).unlink()
    if damage == "truncated":
        (out / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{name} is missing or damaged"):
        (interactions if name == INTERACTIONS_FILE else load_prepared)(out)
