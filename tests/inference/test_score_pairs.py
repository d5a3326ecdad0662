import copy
import json
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from ccf_llm_hf.cli.main import main
from ccf_llm_hf.data.history import stored_histories, stored_history
from ccf_llm_hf.errors import FolderInUse, InputError
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.inference.score_pairs import PairScorer, checkpoint_identity
from ccf_llm_hf.io import lock_folder

PAIRS = {
    "user_id": ["a", "b", "a", "nobody", "b", "a", "a"],
    "item_id": ["3", "1", "4", "2", "5", "1", "A brand new film (2030)"],
    "history": [["2"], [], ["2"], ["1", "3"], ["4"], None, ["2"]],
}


@pytest.fixture(scope="module")
def ranker(checkpoint):
    return CTRRanker.from_pretrained(str(checkpoint), device="cpu")


def write(path, columns=PAIRS):
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def read(folder):
    return pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("part-*.parquet")))


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_shards_hold_what_predict_says_in_the_inputs_order(ranker, tmp_path, rows):
    manifest = PairScorer(ranker, "x", shard_rows=rows).run(write(tmp_path / "p.parquet"), tmp_path)
    table = read(tmp_path)
    assert table.column_names == ["user_id", "item_id", "logit", "probability"]
    assert table["item_id"].to_pylist() == PAIRS["item_id"] and manifest["rows"] == 7
    assert len(list(tmp_path.glob("part-*"))) == -(-7 // rows)
    pairs = [
        {"user": user, "item": item, "history": history or []}
        for user, item, history in zip(*PAIRS.values(), strict=True)
    ]
    np.testing.assert_allclose(table["probability"], ranker.predict(pairs), atol=1e-4)


def test_a_run_cut_off_goes_on_and_ends_the_same(ranker, tmp_path, monkeypatch):
    pairs = write(tmp_path / "p.parquet")
    PairScorer(ranker, "x", shard_rows=2).run(pairs, tmp_path / "whole")
    scored, original = [], PairScorer.score

    def stop_at_third(self, shard):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(shard.first)
        return original(self, shard)

    monkeypatch.setattr(PairScorer, "score", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        PairScorer(ranker, "x", shard_rows=2).run(pairs, tmp_path / "broken")
    assert not json.loads((tmp_path / "broken" / "_manifest.json").read_text())["finished"]
    monkeypatch.setattr(
        PairScorer,
        "score",
        lambda self, shard: (scored.append(shard.first), original(self, shard))[1],
    )
    manifest = PairScorer(ranker, "x", shard_rows=2).run(pairs, tmp_path / "broken")
    assert scored == [0, 2, 4, 6], "no shard is scored twice"
    assert (manifest["rows"], manifest["new_rows"]) == (7, 3)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "broken" / file.name).read_bytes()


def test_another_input_or_checkpoint_is_refused(ranker, tmp_path):
    pairs, out = write(tmp_path / "p.parquet"), tmp_path / "out"
    PairScorer(ranker, "x", shard_rows=2).run(pairs, out)
    with pytest.raises(InputError, match="other checkpoint"):
        PairScorer(ranker, "y", shard_rows=2).run(pairs, out)
    write(pairs, PAIRS | {"item_id": ["1"] * 7})
    with pytest.raises(InputError, match="other pairs"):
        PairScorer(ranker, "x", shard_rows=2).run(pairs, out)
    (out / "_manifest.json").unlink()
    with pytest.raises(InputError, match=r"no _manifest\.json"):
        PairScorer(ranker, "x", shard_rows=2).run(pairs, out)


def test_without_a_history_column_stored_likes_are_used(ranker, tmp_path):
    columns = {name: PAIRS[name] for name in ("user_id", "item_id")}
    pa_csv.write_csv(pa.table(columns), tmp_path / "p.csv")
    likes = {"a": ["2", "5"], "b": ["1"]}
    PairScorer(ranker, "x", likes).run(tmp_path / "p.csv", tmp_path / "out")
    pairs = [
        {"user": user, "item": item, "history": likes.get(user, [])}
        for user, item in zip(*columns.values(), strict=True)
    ]
    found = read(tmp_path / "out")["probability"]
    np.testing.assert_allclose(found, ranker.predict(pairs), atol=1e-4)


def test_a_null_history_is_looked_up_and_an_empty_one_is_not(ranker, tmp_path):
    columns = {"user_id": ["a", "a", "a"], "item_id": ["3", "3", "3"]}
    history = pa.array([None, [], ["1"]], pa.list_(pa.string()))
    pairs = write(tmp_path / "p.parquet", columns | {"history": history})
    PairScorer(ranker, "x", {"a": ["2", "5"]}).run(pairs, tmp_path / "out")
    wanted = [{"user": "a", "item": "3", "history": past} for past in (["2", "5"], [], ["1"])]
    np.testing.assert_allclose(
        read(tmp_path / "out")["probability"], ranker.predict(wanted), atol=1e-4
    )


def test_one_changed_cell_in_the_middle_makes_another_input(ranker, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker, "pair_logits", lambda pairs: np.zeros(len(pairs), dtype=np.float32))
    lines = [f"user-{row:05d},item-{row:05d}" for row in range(20_000)]
    pairs = tmp_path / "p.csv"
    for middle in ("item-10000", "item-10001"):
        lines[10_000] = f"user-10000,{middle}"
        pairs.write_text("\n".join(["user_id,item_id", *lines]) + "\n")
        if middle == "item-10000":
            PairScorer(ranker, "x").run(pairs, tmp_path / "out")
    with pytest.raises(InputError, match="other pairs"):
        PairScorer(ranker, "x").run(pairs, tmp_path / "out")


def test_an_input_that_failed_does_not_claim_its_folder(ranker, tmp_path):
    bad = write(tmp_path / "bad.parquet", {"user_id": ["a", "b", None], "item_id": ["1", "2", "3"]})
    with pytest.raises(InputError, match="row 2 of the pairs has no user_id"):
        PairScorer(ranker, "x", shard_rows=3).run(bad, tmp_path / "out")
    manifest = PairScorer(ranker, "x").run(write(tmp_path / "p.parquet"), tmp_path / "out")
    assert manifest["rows"] == 7
    assert len(pq.read_table(tmp_path / "out")) == 7  # the folder reads as one table


def test_what_is_no_folder_of_scores_is_named(ranker, tmp_path):
    pairs = write(tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"--out .*p\.parquet is a file"):
        PairScorer(ranker, "x").run(pairs, pairs)
    PairScorer(ranker, "x").run(pairs, tmp_path / "out")
    (tmp_path / "out" / "_manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"_manifest\.json is damaged"):
        PairScorer(ranker, "x").run(pairs, tmp_path / "out")


def test_stored_likes_of_all_users_are_those_of_each(prepared):
    likes = stored_histories(prepared)
    assert likes
    for user, items in likes.items():
        assert items == stored_history(prepared, user)


def test_memory_does_not_grow_with_the_input(ranker, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker, "pair_logits", lambda pairs: np.zeros(len(pairs), dtype=np.float32))

    def peak(rows: int) -> int:
        pairs = tmp_path / f"{rows}.parquet"
        ids = pa.array([f"user-{row % 999}" for row in range(rows)])
        pq.write_table(pa.table({"user_id": ids, "item_id": ids}), pairs, row_group_size=5000)
        del ids
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        most = [0]
        score = PairScorer.score

        def watched(self, shard):
            most[0] = max(most[0], pa.total_allocated_bytes() - before)
            return score(self, shard)

        monkeypatch.setattr(PairScorer, "score", watched)
        PairScorer(ranker, "x", shard_rows=1000).run(pairs, tmp_path / f"out{rows}")
        monkeypatch.setattr(PairScorer, "score", score)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return traced + most[0]

    assert peak(40_000) < 1.5 * peak(10_000)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["a"]}, "no column 'item_id'"),
        ({"user_id": ["a", None], "item_id": ["1", "2"]}, "row 1 of the pairs has no user_id"),
        ({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())}, "no rows"),
        ({"user_id": ["a"], "item_id": [" "]}, "row 0 of the pairs has no item_id"),
    ],
)
def test_bad_tables_are_named(ranker, tmp_path, columns, message):
    pairs = write(tmp_path / "p.parquet", columns)
    with pytest.raises(InputError, match=message):
        PairScorer(ranker, "x").run(pairs, tmp_path / "out")
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_file_that_is_no_table_is_named(ranker, tmp_path):
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"p\.parquet cannot be read as pairs"):
        PairScorer(ranker, "x").run(tmp_path / "p.parquet", tmp_path / "out")


def test_the_command_scores_and_says_so(checkpoint, tmp_path, capsys):
    pairs = write(tmp_path / "p.parquet")
    call = ["score", str(checkpoint), "--pairs", str(pairs), "--out", str(tmp_path / "out")]
    assert main(call) == 0
    assert "scored 7 pairs" in capsys.readouterr().out
    model = CTRRanker.from_pretrained(str(checkpoint)).model
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["checkpoint"] == checkpoint_identity(str(checkpoint), model)
    assert main(call) == 0
    assert "all 7 pairs were scored already" in capsys.readouterr().out
    assert main([*call, "--shard-rows", "3"]) == 2
    assert "other shard_rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("processor_config.json", True),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("item_catalog.jsonl", True),
        ("user_ids.jsonl", True),
        ("config.json", True),
        ("model.safetensors", True),
        ("a_new_one.json", True),
        ("README.md", False),
        ("example.json", False),
        ("modeling_ccf_llm.py", False),
    ],
)
def test_scores_are_those_of_one_checkpoint_in_all_its_parts(
    ranker, checkpoint, tmp_path, file, counts
):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    before = checkpoint_identity(str(folder), ranker.model)
    assert before == checkpoint_identity(str(checkpoint), ranker.model)
    with (folder / file).open("ab") as opened:
        opened.write(b" ")
    assert (checkpoint_identity(str(folder), ranker.model) != before) == counts


def test_scores_are_those_of_one_backbone(ranker, checkpoint):
    other = copy.deepcopy(ranker.model)
    other.language_model.layers[0].mlp.up_proj.weight.data += 1
    for name in (str(checkpoint), "org/name"):
        assert checkpoint_identity(name, other) != checkpoint_identity(name, ranker.model)


def test_a_history_in_a_csv_is_refused_not_ignored(ranker, tmp_path):
    (tmp_path / "p.csv").write_text("user_id,item_id,history\na,3,2|5\n")
    with pytest.raises(InputError, match="only parquet can hold"):
        PairScorer(ranker, "x").run(tmp_path / "p.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("user_id,item_id\na,1\nb,2,3\n", ["line 3 has 3 values where the header has 2"]),
        ("user_id,item_id\n\na,1\n\nb\n", ["line 5 has 1 value where the header has 2"]),
        (
            "user_id,item_id\na,Lion King, The (1994)\n",
            ["line 2 has 3 values", "in quotes"],
        ),
        ('user_id,item_id\na,1\nb,"2\nc,3\n', ["line 3 opens a quote"]),
        ('user_id,item_id\na,1\nb,"2' + "\nc,3" * 40_000, ["line 3 opens a quote"]),
        ("user_id,item_id\na,\udcff\n", ["line 2 is not UTF-8: save it as UTF-8"]),
        (
            "user_id,item_id\na,1\n".encode("utf-16").decode("utf-8", "surrogateescape"),
            ["line 1 is not UTF-8: save it as UTF-8"],
        ),
        ("", ["Empty CSV file"]),
        # Past the first block, which is read when the file is opened.
        ("user_id,item_id\n" + "a,1\n" * 300_000 + "b\n", ["line 300002 has 1 value where"]),
    ],
)
def test_a_malformed_csv_is_refused_by_line(ranker, tmp_path, monkeypatch, text, fragments):
    monkeypatch.setattr(ranker, "pair_logits", lambda pairs: np.zeros(len(pairs), dtype=np.float32))
    pairs = tmp_path / "p.csv"
    pairs.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        PairScorer(ranker, "x", shard_rows=200_000).run(pairs, tmp_path / "out")
    assert str(caught.value).startswith(f"{pairs} is not a well-formed CSV file: ")
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_other_columns_of_a_csv_may_hold_anything(ranker, tmp_path, monkeypatch):
    monkeypatch.setattr(ranker, "pair_logits", lambda pairs: np.zeros(len(pairs), dtype=np.float32))
    pairs = tmp_path / "p.csv"
    # Over a megabyte of integers, then none: a type guessed from the beginning would not hold.
    pairs.write_text("user_id,item_id,rank\n" + "a,1,1\n" * 200_000 + "a,1,first\n")
    manifest = PairScorer(ranker, "x", shard_rows=300_000).run(pairs, tmp_path / "out")
    assert manifest["rows"] == 200_001


def as_file(folder, kind):
    """Two pairs in one of the forms that they come in."""
    users, items = ["a", "nobody"], ["3", "999"]
    if kind in (".csv", ".tsv"):
        delimiter = {".csv": ";", ".tsv": "\t"}[kind]
        rows = [("user_id", "item_id"), *zip([" a", "nobody "], ["3.0", "999"], strict=True)]
        (folder / f"p{kind}").write_text("\n".join(delimiter.join(row) for row in rows))
        return folder / f"p{kind}"
    if kind == "folder":
        (folder / "p").mkdir()
        for row in range(2):
            write(folder / "p" / f"{row}.parquet", {"user_id": users[row:][:1], "item_id": ["3"]})
        write(folder / "p" / "1.parquet", {"user_id": users[1:], "item_id": items[1:]})
        return folder / "p"
    columns = {
        "bytes": {"user_id": [b"a", b"nobody"], "item_id": [b"3", b"999"]},
        "floats": {"user_id": users, "item_id": [3.0, 999.0]},
        "integers": {"user_id": users, "item_id": [3, 999]},
    }
    return write(folder / "p.parquet", columns[kind])


@pytest.mark.parametrize("kind", [".csv", ".tsv", "folder", "bytes", "floats", "integers"])
def test_ids_are_the_same_by_whatever_door(ranker, tmp_path, kind):
    manifest = PairScorer(ranker, "x", {"a": ["2"]}).run(as_file(tmp_path, kind), tmp_path / "out")
    wanted = ranker.predict([{"user": "a", "item": "3", "history": ["2"]}, ("nobody", "999")])
    np.testing.assert_allclose(read(tmp_path / "out")["probability"], wanted, atol=1e-4)
    assert (manifest["rows"], manifest["unknown_users"], manifest["unknown_items"]) == (2, 1, 1)
    assert "1 user unknown to the model, such as 'nobody'" in manifest["unknown"]


@pytest.mark.parametrize("user", ["", " ", None, float("nan")])
def test_a_pair_without_a_user_is_refused(ranker, tmp_path, user):
    known = 1.0 if isinstance(user, float) else "a"
    pairs = write(tmp_path / "p.parquet", {"user_id": [known, user], "item_id": ["1", "2"]})
    with pytest.raises(InputError, match="row 1 of the pairs has no user_id"):
        PairScorer(ranker, "x").run(pairs, tmp_path / "out")


def test_a_folder_that_another_process_scores_into_is_refused(ranker, tmp_path):
    pairs = write(tmp_path / "p.parquet")
    with lock_folder(tmp_path / "out"), pytest.raises(FolderInUse, match="another process works"):
        PairScorer(ranker, "x").run(pairs, tmp_path / "out")
    (tmp_path / "out" / ".partial-7-part-00000.parquet").write_bytes(
        b"PAR1"
    )  # of one that was killed
    assert PairScorer(ranker, "x").run(pairs, tmp_path / "out")["new_rows"] == 7
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {".lock", "_manifest.json", "part-00000.parquet"}
