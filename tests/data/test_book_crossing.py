import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import DatasetCard

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.data.book_crossing import mend_text, read_book_crossing, strip_brackets
from ccf_llm_hf.errors import InputError

BOOKS = r"""
"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S"
"1";"Emma (Signet Classics (Paperback))";"Jane Austen";"1996";"Signet Book";"http://a"
"2";"EMMA";"JANE  AUSTEN";"0";"Bantam";"http://a"
"3";"A Child Called \"It\": One Child's Courage";"Dave Pelzer";"1995";"Health; Inc";"http://a"
"4";"Bread &amp; Butter";"Ann &amp; Bob";"0";"Smith &amp; Sons";"http://a"
"5";"Der KÃ?Â¶nig in Gelb";"Chambers";"2001";"Bastei";"http://a"
"6";"Emma";"Another Author";"2001";"Signet Book";"http://a"
"7";"Unloved";"Nobody";"2001";"Signet Book";"http://a"
""".strip()


def ratings(rows: list[tuple[str, str, int]]) -> str:
    lines = [f'"{user}";"{isbn}";"{rating}"' for user, isbn, rating in rows]
    return "\n".join(['"User-ID";"ISBN";"Book-Rating"', *lines])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty users rate the five books that are rated; edition 2 of Emma more often than 1."""
    rows = [(f"{u}", isbn, 1 + (3 * u + int(isbn)) % 10) for isbn in "3456" for u in range(40)]
    rows += [(f"{u}", "2" if u % 3 else "1", 8 + u % 2) for u in range(40)]
    rows += [("0", "2", 1), ("0", "7", 0), ("1", "nowhere", 9), ("few", "3", 9), ("few", "4", 11)]
    (tmp_path / "bx").mkdir()
    (tmp_path / "bx" / "BX-Book-Ratings.csv").write_text(ratings(rows), encoding="latin-1")
    (tmp_path / "bx" / "BX-Books.csv").write_text(BOOKS, encoding="latin-1")
    return tmp_path / "bx"


def config(folder: Path, **options: object) -> PrepareConfig:
    given = {"source": "book-crossing", "input": str(folder), "out": str(folder.parent / "out")}
    return PrepareConfig(**{**given, **options})  # type: ignore[arg-type]


def test_editions_of_a_title_and_author_are_one_book_called_as_the_most_rated(folder: Path) -> None:
    tables, rule = read_book_crossing(folder)
    books = tables.items.set_index("item_id")
    assert books.loc["2", ["title", "author", "year", "publisher"]].tolist() == [
        "EMMA",
        "JANE  AUSTEN",
        "",
        "Bantam",
    ]
    assert set(books.index) == {"2", "3", "4", "5", "6", "7"}
    assert (tables.interactions["item_id"] == "2").sum() == 41
    assert not (tables.interactions["item_id"] == "1").any()
    assert "7 editions are 6 books" in rule


def test_quotes_entities_semicolons_and_umlauts_are_read(folder: Path) -> None:
    books = read_book_crossing(folder)[0].items.set_index("item_id")
    assert books.loc["3", "title"] == 'A Child Called "It": One Child\'s Courage'
    assert books.loc["3", "publisher"] == "Health; Inc"
    assert books.loc["4", ["title", "author", "publisher"]].tolist() == [
        "Bread & Butter",
        "Ann & Bob",
        "Smith & Sons",
    ]
    assert books.loc["5", "title"] == "Der König in Gelb"


def test_text_that_is_right_already_stays() -> None:
    given = pd.Series(["Márquez", "Ã¶", "Ã?Â?bel fÃ?Â¼r", "Ã", "¿Qué?"])
    assert mend_text(given).tolist() == ["Márquez", "ö", "Ã?Â?bel für", "Ã", "¿Qué?"]


@pytest.mark.parametrize(
    ("title", "short"),
    [
        ("Emma (Signet Classics (Paperback))", "Emma"),
        ("Julius Caesar (Dover) [UNABRIDGED]", "Julius Caesar"),
        ("Law of the Jungle (Hardy Boys 105) : Law", "Law of the Jungle : Law"),
        ("(Un)arranged Marriage", "(Un)arranged Marriage"),
        ("(George)", "(George)"),
        ("Long Lavender Look (R", "Long Lavender Look (R"),
    ],
)
def test_brackets(title: str, short: str) -> None:
    assert strip_brackets(title) == short


def test_every_row_read_is_accepted_or_rejected_for_a_reason(folder: Path) -> None:
    out = prepare(config(folder), summary=False)
    protocol = json.loads((out / "protocol.json").read_text())
    rejected = {reason: entry["count"] for reason, entry in protocol["rejected"].items()}
    assert rejected == {
        "not_rated": 1,
        "unknown_item": 1,
        "invalid_rating": 1,
        "repeated_pair": 1,
        "inactive_user": 1,
    }
    lines = (folder / "BX-Book-Ratings.csv").read_text().splitlines()
    assert protocol["accepted_rows"] + sum(rejected.values()) == len(lines) - 1
    assert protocol["rejected"]["not_rated"]["examples"] == ["BX-Book-Ratings.csv:203"]
    log = interactions(out)
    assert Counter(log["user_id"]) == {str(user): 5 for user in range(40)}
    assert ((log["rating"] >= 8) == (log["label"] == 1)).all()
    # Of two ratings of one book the first is kept.
    assert log.set_index(["user_id", "item_id"]).loc[("0", "2"), "rating"] == 8


def test_prepared_folder_and_card_tell_what_was_done(folder: Path) -> None:
    out = prepare(config(folder, histories="signed"), summary=False)
    data = load_prepared(out)
    protocol = data.protocol
    assert protocol["item_fields"] == ["author", "year", "publisher"]
    assert protocol["has_times"] is False
    assert protocol["frozen_histories"] is True
    assert protocol["redistributable"] is False
    assert "language" not in protocol
    assert set(data.items["item_id"]) == {"2", "3", "4", "5", "6"}
    assert "first_timestamp" not in protocol["splits"]["train"]
    text = DatasetCard.load(out / "README.md").text
    for name in ("split_rule", "history_rule", "row_rule", "item_rule", "timestamp_rule"):
        assert protocol[name] in text
    assert "10.1145/1060745.1060754" in text
    assert "Do not upload this folder" in text
    assert "`author`, `year`, `publisher`" in text


def test_parts_of_the_users_are_disjoint_and_make_up_all(folder: Path) -> None:
    whole = interactions(prepare(config(folder), summary=False))
    parts = []
    for number in (1, 2):
        out = prepare(config(folder, users=f"{number}/2"), summary=False)
        part, protocol = interactions(out), load_prepared(out).protocol
        assert protocol["rejected"]["other_user"]["count"] == len(whole) - len(part)
        assert f"part {number}/2 of the users" in protocol["row_rule"]
        assert 10 <= part["user_id"].nunique() <= 30
        parts.append(part)
    assert not set(parts[0]["user_id"]) & set(parts[1]["user_id"])
    key = ["user_id", "item_id"]
    found = pd.concat(parts).sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(found, whole.sort_values(key, ignore_index=True))


@pytest.mark.parametrize("users", ["0/2", "3/2", "half", "1/"])
def test_a_part_that_cannot_be_is_refused(folder: Path, users: str) -> None:
    with pytest.raises(InputError, match="--users must be K/N"):
        prepare(config(folder, users=users), summary=False)


def test_other_seeds_and_shares(folder: Path) -> None:
    def splits(**options: object) -> pd.DataFrame:
        out = prepare(config(folder, **options), summary=False)
        return interactions(out).sort_values(["user_id", "item_id"])["split"].tolist()

    assert splits() == splits(split="random")
    assert splits() != splits(seed=1)
    assert Counter(splits(ratios=[0.4, 0.3, 0.3]))["train"] < 110


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "ratio"}, "book-crossing has no times: --split must be random, not ratio"),
        ({"ratios": [0.5, 0.5]}, "--ratios must be three"),
        ({"time_column": "when"}, "--time-column has no meaning for the source book-crossing"),
        ({"item_fields": ["author"]}, "--item-fields has no meaning for the source book-crossing"),
    ],
)
def test_options_without_meaning_are_refused(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(config(folder, **options))


def test_files_that_are_not_book_crossing(folder: Path) -> None:
    (folder / "BX-Books.csv").write_text("a;b\n1;2\n")
    with pytest.raises(InputError, match=r"BX-Books\.csv has no column 'ISBN'.* as they were publ"):
        prepare(config(folder))
    (folder / "BX-Books.csv").unlink()
    with pytest.raises(InputError, match="is not a folder of book-crossing"):
        prepare(config(folder))


@pytest.mark.slow
def test_the_real_ratings(tmp_path: Path) -> None:
    data = load_prepared(
        prepare(PrepareConfig(source="book-crossing", out=str(tmp_path / "out")), summary=False)
    )
    splits = data.protocol["splits"]
    assert [split["rows"] for split in splits.values()] == [241_146, 30_003, 29_693]
    assert data.protocol["accepted_rows"] == 300_842
    assert splits["train"]["users"] == 12_785
    assert round(splits["test"]["positive_rate"], 4) == 0.5925
    assert round(splits["test"]["unseen_item_rate"], 3) == 0.291
    rejected = data.protocol["rejected"].values()
    assert 300_842 + sum(entry["count"] for entry in rejected) == 1_149_780
    assert len(data.items) == 117_147
