"""What reads input from outside, by name, each called on a case of the corpus."""

import contextlib
import io
import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccf_llm_hf import CCFLLMConfig, CCFLLMProcessor
from ccf_llm_hf.cf.config import LightGCNConfig, MFConfig, SASRecConfig
from ccf_llm_hf.cli.main import main
from ccf_llm_hf.data.prepare import PrepareConfig, prepare
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.inference.score_pairs import PairScorer
from ccf_llm_hf.training.recipe import parse_recipe

CONFIGS = {one.__name__: one for one in (CCFLLMConfig, MFConfig, LightGCNConfig, SASRecConfig)}
ROOT = Path(__file__).resolve().parents[2]  # our own code, of which these readers are a part
Reader = Callable[[dict[str, Any], Path], object]


class Readers:
    """The readers over one checkpoint; each takes a case and an empty folder to work in."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.ranker = CTRRanker(*load_checkpoint(str(checkpoint)))

    def tables(self, case: dict[str, Any], folder: Path) -> object:
        """`ccf-llm prepare table`: interactions, see `write_table`, text of items, and options."""
        config: dict[str, Any] = {"source": "table", "out": str(folder / "out")}
        for name, text in (("interactions", write_table(case)), ("items", case.get("items"))):
            if text is not None:
                file = folder / f"{name}.csv"
                file.write_text(text, encoding="utf-8")
                config[name] = str(file)
        try:
            return prepare(PrepareConfig(**config, **case["options"]), summary=False)
        except Exception:
            assert not (folder / "out").exists(), "half a folder was left"
            raise

    def recipes(self, case: dict[str, Any], folder: Path) -> object:
        """`ccf-llm train`: a recipe's text and flags."""
        file = folder / "recipe.yaml"
        if case["text"] is not None:
            file.write_text(case["text"], encoding="utf-8")
        return parse_recipe(["--config", str(file), *case.get("flags", [])])

    def prompts(self, case: dict[str, Any], _: Path) -> object:
        """A call of the processor."""
        return self.ranker.processor(**case)

    def processors(self, case: dict[str, Any], _: Path) -> object:
        """The processor's settings."""
        catalog = {"item_ids": ["a", "b"], "item_titles": ["A", "B"], "user_ids": ["u"]}
        return CCFLLMProcessor(self.ranker.processor.tokenizer, **catalog | case)

    def requests(self, case: dict[str, Any], _: Path) -> object:
        """A call of the ranker: the method's name and its arguments."""
        ((method, arguments),) = case.items()
        return getattr(self.ranker, method)(**arguments)

    def settings(self, case: dict[str, Any], _: Path) -> object:
        """A configuration class: its name and fields."""
        ((name, fields),) = case.items()
        return CONFIGS[name](**fields)

    def pairs(self, case: dict[str, Any], folder: Path) -> object:
        """`ccf-llm score`: the text of its pairs."""
        (folder / "pairs.csv").write_text(case["text"], encoding="utf-8")
        return PairScorer(self.ranker, "one", {}, 100).run(folder / "pairs.csv", folder / "out")

    def commands(self, case: dict[str, Any], folder: Path) -> object:
        """A command line, run in an empty folder; argparse itself may end it."""
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stderr(said):
            try:
                code = main(case["argv"])
            except SystemExit as end:
                code = end.code
        if code == 2:
            raise ValueError(said.getvalue().strip().splitlines()[-1])
        return code

    def checkpoints(self, case: dict[str, Any], folder: Path) -> object:
        """A checkpoint one of whose files is missing, is other text, or has other values."""
        for source in self.checkpoint.iterdir():
            if source.is_file() and source.name != case["file"]:
                (folder / source.name).symlink_to(source)
        damage(self.checkpoint / case["file"], folder / case["file"], case)
        return load_checkpoint(str(folder))


def write_table(case: dict[str, Any]) -> str:
    """The text of 24 sound rows as a case changes it: another `header`, some `rows`, or values of
    `columns` in turn; `only` other rows, or another `text`. With `items` it has no titles."""
    names = ["user_id", "item_id", "title", "rating", "timestamp"]
    header = case.get("header", ",".join(names))
    rows = []
    for n in range(24):
        values = [f"u{n % 4}", f"i{n % 6}", f"Film {n % 6}", n % 5 + 1, 1_600_000_000 + 1000 * n]
        for name, given in case.get("columns", {}).items():
            values[header.split(",").index(name)] = given[n % len(given)]
        rows.append(",".join(map(str, values)))
    for place, row in case.get("rows", {}).items():
        rows[place] = row
    lines = [header, *case.get("only", rows)]
    if "items" in case:
        lines = [re.sub(r",(title|Film \d)", "", line) for line in lines]
    return case.get("text", "\n".join(lines) + "\n")


def damage(source: Path, target: Path, case: dict[str, Any]) -> None:
    """Write `source` to `target` as a case changes it; not at all where its text is None."""
    whole = source.read_bytes()
    if "set" in case:
        whole = json.dumps(json.loads(whole) | case["set"]).encode()
    elif "append" in case:
        whole += case["append"].encode()
    elif "bytes" in case:
        whole += bytes.fromhex(case["bytes"])
    elif "truncate" in case:
        whole = whole[: int(len(whole) * case["truncate"])]
    elif case["text"] is None:
        return
    else:
        whole = case["text"].encode()
    target.write_bytes(whole)


def refuse(reader: Reader, case: dict[str, Any], folder: Path) -> str | None:
    """The sentence by which a reader refuses a case, None where it takes it; any other exception
    than our own goes on."""
    try:
        reader(case, folder)
    except InputError as error:
        return str(error)
    except (ValueError, OSError) as error:
        *_, last = traceback.walk_tb(error.__traceback__)
        if not Path(last[0].f_code.co_filename).is_relative_to(ROOT):
            raise
        return str(error)
    return None
