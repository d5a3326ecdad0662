"""README and results say what the committed results files do, and the README's code runs."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs.pages import ROOT, blocks, commands, run_command
from transformers import PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMProcessor
from ccf_llm_hf.cli import main as cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCORED = r"0\.\d{3}  .+"


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 9_000


def test_figures_come_from_the_results_files() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_answer_to_whether_it_helps_is_what_was_measured() -> None:
    """On MovieLens-1M with the CF logit as MF, without it below; in the demo nothing over the CF
    logit, and the linear hybrid above."""
    rows = json.loads((ROOT / "results/ml-1m/table.json").read_text())
    named = {(row["track"], row["arm"], row["training"]): row["differences"] for row in rows}
    low, high = named["protocol", "gate and CF logit", "joint"]["MF"]["auc_wide"]
    assert -0.005 < low < 0 < high < 0.005
    assert named["protocol", "gate", "joint"]["MF"]["auc_wide"][1] < 0
    demo = json.loads((ROOT / "results/demo/metrics.json").read_text())["differences"]
    low, high = demo["CF logit alone"]["auc_ci"]
    assert low < 0 < high
    assert demo["linear hybrid"]["auc_ci"][1] < 0


def test_figures_in_the_prose_of_the_results_are_those_of_a_results_file() -> None:
    prose = re.sub(
        r"<!-- (\w+): begin.*?<!-- \1: end[^>]*>",
        "",
        (ROOT / "docs" / "results.md").read_text(),
        flags=re.DOTALL,
    )
    figures = set(re.findall(r"(?<!\d)0?(\.\d{4})", prose))
    assert len(figures) > 5
    table = json.loads((ROOT / "results/ml-1m/table.json").read_text())
    measured = {f"{abs(number):.4f}".removeprefix("0") for number in numbers_in(table)}
    measured |= set(re.findall(r"\.\d{4}", (ROOT / "results/ml-1m/experiments.md").read_text()))
    assert figures - measured == set()


def numbers_in(data: object) -> Iterator[float]:
    """Every float of a JSON document, however deep."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from numbers_in(part)
    elif isinstance(data, float):
        yield data


def test_every_block_is_of_a_language_that_is_tested() -> None:
    opened = re.findall(r"^```(\w*)\n", README, re.MULTILINE)[::2]
    assert set(opened) == {"bash", "python", "text", "bibtex"}


def test_the_commands_are_those_of_the_tutorial_which_are_run() -> None:
    *targets, prepare, fit, train, rank = commands("README.md")
    assert targets == [["make", "demo"], ["make", "test"]]
    for words in targets:
        run_command(words)
    assert commands("docs/own-table.md")[:4] == [prepare, fit, train, rank]


def test_the_python_prints_three_places_a_probability_and_why(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec("\n".join(blocks("README.md", "python")), {})
    first, second, third, probability, *explanation = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(SCORED, line) for line in (first, second, third))
    assert re.fullmatch(r"\[0\.\d+\]", probability)
    assert re.match(r"probability 0\.\d{3}", explanation[0])
    assert "The logit is the sum of" in explanation


def test_commands_in_the_prose_exist() -> None:
    named = re.findall(r"`(ccf-llm [^`]+)`", README)
    assert named
    for command in named:
        cli.parse(shlex.split(command)[1:])


def test_the_drawn_prompt_is_the_one_that_the_model_reads(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    titles = ["Toy Story (1995)", "Heat (1995)", "Se7en (1995)", "Alien (1979)"]
    processor = CCFLLMProcessor(
        tokenizer, titles, titles, ["u1"], history_format="slot", candidate_format="slot"
    )
    batch = processor(user="u1", history=titles[:2], candidates=titles[2:])
    drawn, last = "", 0
    columns = ("input_ids", "user_slots", "item_slots", "block_ids")
    for token, user, item, block in zip(*(batch[c][0].tolist() for c in columns), strict=True):
        drawn += "\n  | " * (block > last)
        last = block
        slot = f"[{titles[item]}]" if item >= 0 else "[u1]" * (user >= 0)
        drawn += slot or tokenizer.decode([token])
    (prompt,) = [block for block in blocks("README.md", "text") if block.startswith("Will")]
    assert drawn == prompt.removesuffix("\n")


def test_the_picture_is_the_one_that_its_script_draws() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    import draw_prompt

    assert draw_prompt.PICTURE.read_text(encoding="utf-8") == draw_prompt.draw()


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
