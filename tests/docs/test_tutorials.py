"""The tutorials run from the first block to the last, in one folder, on a tiny backbone."""

import re
import sys
from pathlib import Path

import pytest
from docs.pages import ROOT, blocks, run_command, split_commands

FENCE = re.compile(r"(?<!-->\n)^```(python|bash|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RANKED = r" *\d+\.  0\.\d{3}  .+"


def run_page(page: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a page's blocks in order, its Python in one session; a `text` block is what the one
    before it prints. Returns what each printed."""
    session: dict[str, object] = {}
    printed: list[str] = []
    for language, block in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        if language == "text":
            assert printed[-1] == block
            continue
        capsys.readouterr()
        if language == "python":
            exec(compile(block, page, "exec"), session)
        else:
            for words in split_commands(block):
                run_command(words)
        printed.append(capsys.readouterr().out)
    return printed


def test_from_a_table_to_a_ranked_list_to_a_new_item_to_own_vectors(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    *_, ranked, evaluated = run_page("docs/own-table.md", capsys)
    lines = ranked.splitlines()
    assert len(lines) == 11 + 4
    assert all(re.fullmatch(RANKED, line) for line in lines if not line.endswith("item"))
    assert "CF logit alone" in evaluated and "linear hybrid" not in evaluated

    first_day, python, *_ = run_page("docs/new-item.md", capsys)
    assert "Murder of Lisbon  (not in the CF model)" in first_day
    assert "The logit is the sum of" in first_day
    assert "Murder of Lisbon  known to CF: False" in python
    assert "Roses of Oslo  known to CF: True" in python
    assert (place / "runs" / "week" / "checkpoint" / "config.json").is_file()

    run_page("docs/cf-vectors.md", capsys)
    assert (place / "runs" / "own" / "fused" / "config.json").is_file()


def test_the_metrics_print_what_stands_below(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("docs/evaluation.md", capsys)


def test_the_quick_start_runs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec("\n".join(blocks("docs/index.md", "python")), {})
    *places, shape = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"0\.\d{3}  .+", line) for line in places)
    assert shape == "torch.Size([1, 1])"
