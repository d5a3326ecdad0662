"""What `ccf-llm prepare` can be told."""

from dataclasses import dataclass, field

SOURCES = (
    "ml-1m",
    "ml-100k",
    "ml-latest-small",
    "book-crossing",
    "amazon-books",
    "collm",
    "table",
)


@dataclass
class PrepareConfig:
    """What to prepare, from where, and by which protocol.

    `ml-1m` follows CoLLM's protocol (months since the first rating's: train 14-23, validation
    24-28, test 29-33); `ml-100k` and `ml-latest-small` are cut 80/10/10 by time (our choice); all
    three take label = rating >= 4. `book-crossing` has no times: it is split 80/10/10 at random,
    label = rating >= 8, users with 5 ratings or more (our choice). `amazon-books` follows CoLLM's
    protocol (2017 only: train January-November, December halved by time, label = rating 5). `collm`
    keeps the rows that CoLLM published. Of the options below, the `ml-*` sources use `out`,
    `input`, `offline`, `cache_dir`, `histories`, `max_history` and `frozen_histories` only,
    `book-crossing` also `split`, `ratios`, `seed` and `users`, `amazon-books` those of `ml-*`
    without `offline` and `cache_dir`, `collm` `out` and `input` only, and `table` uses the others.
    """

    source: str = field(default="ml-1m", metadata={"help": ", ".join(SOURCES)})
    out: str = field(default="", metadata={"help": "folder to write"})
    input: str | None = field(
        default=None,
        metadata={
            "help": "folder of the raw files (ml-*, book-crossing: default is to download them; "
            "amazon-books: reviews and meta_ files as .json or .jsonl, also .gz; collm: the three "
            "_ood2.pkl)"
        },
    )
    offline: bool = field(
        default=False, metadata={"help": "ml-*, book-crossing: do not use the network"}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "ml-*, book-crossing: cache of downloads (default: $CCF_LLM_CACHE)"},
    )
    name: str | None = field(default=None, metadata={"help": "table: name in the dataset card"})
    interactions: str | None = field(
        default=None, metadata={"help": "table: .csv, .tsv (also .gz) or .parquet of interactions"}
    )
    items: str | None = field(
        default=None,
        metadata={"help": "table: file of items (default: titles are in the interactions)"},
    )
    user_column: str = field(default="user_id", metadata={"help": "table: column of user ids"})
    item_column: str = field(
        default="item_id", metadata={"help": "table: column of item ids, in both files"}
    )
    time_column: str = field(
        default="timestamp",
        metadata={
            "help": "table: column of times, Unix time or ISO dates; none is needed with "
            "split=random"
        },
    )
    title_column: str = field(default="title", metadata={"help": "table: column of item titles"})
    item_fields: list[str] = field(
        default_factory=list,
        metadata={
            "help": "table: columns that describe items, text or lists of text (author genres "
            "brand year); in --items if there is such a file"
        },
    )
    field_separator: str | None = field(
        default=None,
        metadata={
            "help": "table: what stands between the values of an item field, such as | in "
            "Drama|War; a field in which it occurs becomes lists"
        },
    )
    rating_column: str | None = field(
        default=None, metadata={"help": "table: column of ratings (this or --label-column)"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "table: column of 0/1 labels (this or --rating-column)"}
    )
    positive_threshold: float = field(
        default=4.0, metadata={"help": "table: label 1 is a rating of at least this"}
    )
    time_unit: str = field(default="s", metadata={"help": "table: unit of numeric times, s or ms"})
    split: str | None = field(
        default=None,
        metadata={
            "help": "table: ratio (shares by time, the default), time (given dates) or random (a "
            "seeded hash of user and item; needs no times, and histories of validation and test "
            "hold training rows only); book-crossing: random"
        },
    )
    ratios: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        metadata={
            "help": "table: shares of train, validation and test, cut in order of time; "
            "split=random: their chances"
        },
    )
    seed: int = field(default=0, metadata={"help": "split=random: of the split, and of the order"})
    valid_start: str | None = field(
        default=None, metadata={"help": "table, split=time: validation starts (time or ISO date)"}
    )
    test_start: str | None = field(
        default=None, metadata={"help": "table, split=time: test starts (time or ISO date)"}
    )
    users: str | None = field(
        default=None,
        metadata={
            "help": "table, book-crossing: K/N keeps the K-th of N parts of the users, by a hash "
            "of their ids; to train on some users and score others"
        },
    )
    license: str | None = field(
        default=None,
        metadata={"help": "table: license of the data, for its card: an id such as cc-by-4.0"},
    )
    language: str | None = field(
        default=None, metadata={"help": "table: language of the titles, for cards: en, de, ..."}
    )
    histories: str = field(
        default="likes",
        metadata={
            "help": "likes (the papers' protocol: earlier likes within the splits) or signed "
            "(all earlier rows, dislikes too, with their labels)"
        },
    )
    max_history: int | None = field(
        default=None, metadata={"help": "store only this many latest items of a history"}
    )
    frozen_histories: bool = field(
        default=False,
        metadata={
            "help": "histories of validation and test rows hold no row of validation or test; "
            "always so with split=random"
        },
    )
