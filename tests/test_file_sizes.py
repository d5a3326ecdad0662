"""One job a file: what grows past 450 lines is to be split (CONTRIBUTING.md)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 450


def test_no_file_of_the_package_or_of_what_tests_share_is_too_long() -> None:
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("modeling/*.py")]
    files += [path for path in ROOT.glob("tests/**/*.py") if not path.name.startswith("test_")]
    assert len(files) > 60
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
    }
    assert {name: lines for name, lines in lengths.items() if lines >= LIMIT} == {}
