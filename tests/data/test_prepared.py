import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.data.prepared import INTERACTIONS_FILE, ITEMS_FILE, KINDS, ROW_COLUMNS, split_file
from ccf_llm_hf.errors import InputError

NEEDED = {*ROW_COLUMNS, "history", "title", "rating", "split"}
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


@pytest.mark.parametrize("name", [split_file("test"), ITEMS_FILE, INTERACTIONS_FILE])
def test_a_column_of_another_kind_is_named(name: str, prepared_config: Make) -> None:
    out = prepare(prepared_config(), summary=False)
    load = interactions if name == INTERACTIONS_FILE else load_prepared
    whole = pq.read_table(out / name)
    for place, column in enumerate(whole.column_names):
        if column not in KINDS:
            continue
        odd = pa.array([b"\xff"] * len(whole))
        empty = pa.nulls(len(whole), whole.schema[place].type)
        for content in (odd, empty if column != "rating" else odd, None):
            table = whole.drop_columns([column])
            if content is not None:
                table = whole.set_column(place, column, content)
            pq.write_table(table, out / name)
            if content is None and column not in NEEDED:
                continue
            with pytest.raises(InputError, match=rf"{name} .*{column}.*prepare` again"):
                load(out)
    if "label" in whole.column_names:
        place = whole.column_names.index("label")
        pq.write_table(whole.set_column(place, "label", pa.array([7] * len(whole))), out / name)
        with pytest.raises(InputError, match=rf"{name} holds labels other than 0 and 1"):
            load(out)


@pytest.mark.parametrize(
    "change",
    [{"item_fields": 3}, {"has_times": "x"}, {"histories": None}, {"splits": []}, {"name": 1}],
)
def test_a_protocol_of_other_kinds_is_named(change: dict, prepared_config: Make) -> None:
    out = prepare(prepared_config(), summary=False)
    file = out / "protocol.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=rf"protocol\.json is damaged: {next(iter(change))} is"):
        load_prepared(out)
