"""Random damage to inputs: whatever a reader makes of it, no exception may be another than ours.

`make fuzz` gives it an hour; CCF_LLM_FUZZ_SECONDS and CCF_LLM_FUZZ_SEED change time and draw.
"""

import copy
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input.readers import Readers, refuse, write_table

SECONDS = float(os.environ.get("CCF_LLM_FUZZ_SECONDS", 60))
SEED = int(os.environ.get("CCF_LLM_FUZZ_SEED", 0))
KINDS = ("prompts", "requests", "tables", "pairs", "recipes", "checkpoints")
TEXTS = ("text", "items", "append")  # keys of a case that stand for what is in a file
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "3",
    "yes",
    "\x00",
    "\ud800",
    "é" * 50,
    b"\xff",
    [],
    [[]],
    [None],
    {},
    {"id": None},
    {"id": "1", "title": 5},
    {"a": {"b": []}},
    ("1", "2"),
    {1, 2},
]
PIECES = [
    "",
    ",",
    ";",
    "\t",
    '"',
    "'",
    "\n",
    "\r\n",
    "\x00",
    "\ufeff",
    "é",
    "🎬",
    "nan",
    "-1",
    "1e999",
]
PIECES += [
    "[",
    "{",
    "}",
    ": ",
    "- ",
    "&a",
    "*a",
    "null",
    "true",
    "9" * 40,
    "user_id",
    "i0",
    "\u2028",
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_exception_but_ours(readers: Readers, kind: str, tmp_path: Path) -> None:
    logging.disable()
    draw = random.Random(f"{SEED} {kind}")
    corpus = yaml.safe_load((Path(__file__).parent / f"{kind}.yaml").read_text(encoding="utf-8"))
    reader = getattr(readers, kind)
    end = time.monotonic() + SECONDS / len(KINDS)
    tried = refused = 0
    try:
        while time.monotonic() < end:
            case = copy.deepcopy(draw.choice(corpus)["given"])
            if kind == "tables":
                case["text"] = write_table(case)
            case = damage_case(kind, case, draw)
            folder = tmp_path / "case"
            folder.mkdir()
            try:
                refused += refuse(reader, case, folder) is not None
            except Exception as error:
                pytest.fail(f"{kind}, after {tried} cases: {case!r} gave {error!r}")
            shutil.rmtree(folder)
            tried += 1
    finally:
        logging.disable(logging.NOTSET)
    assert tried >= 10 and refused >= tried / 10
    print(f"{kind}: {tried} cases, {refused} refused, no exception but ours")


def damage_case(kind: str, case: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A case with one to three of its values replaced, or of its texts damaged."""
    texts = [(case, key) for key in TEXTS if isinstance(case.get(key), str)]
    values = {
        "prompts": lambda: case,
        "requests": lambda: next(iter(case.values())),
        "checkpoints": lambda: case.get("set", {}),
    }
    for _ in range(draw.randint(1, 3)):
        places = texts if texts or kind not in values else list(leaves(values[kind]()))
        if not places:
            break
        holder, key = draw.choice(places)
        if isinstance(holder[key], str) and (texts or draw.random() < 0.5):
            holder[key] = damage_text(holder[key], draw)
        else:
            junk = [
                one for one in JUNK if kind != "checkpoints" or not isinstance(one, (bytes, set))
            ]
            holder[key] = copy.deepcopy(draw.choice(junk))
    return case


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) at which a value lies in dicts and lists."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from leaves(inner)


def damage_text(text: str, draw: random.Random) -> str:
    """Text with a piece cut out, put in, doubled or swapped."""
    start, end = sorted(draw.randint(0, len(text)) for _ in range(2))
    end = min(end, start + 40)
    way = draw.randrange(4)
    if way == 0:
        return text[:start] + text[end:]
    if way == 1:
        return text[:start] + draw.choice(PIECES) + text[start:]
    if way == 2:
        return text[:end] + text[start:end] + text[end:]
    return text[:start] + draw.choice(PIECES) + text[end:]
