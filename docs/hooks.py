"""What the site makes of the pages: the help of every command is added, as the parsers have it, and
links to files of the repository outside of docs/ are text."""

import contextlib
import io
import os
import re
from typing import Any

from ccf_llm_hf.cf.config import CF_CONFIGS
from ccf_llm_hf.cli.main import COMMANDS, parse

PLACE = "<!-- help -->"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page as the site has it."""
    markdown = OUTSIDE.sub(r"\1", markdown)
    if PLACE not in markdown:
        return markdown
    models = [f"fit-cf {model}" for model in CF_CONFIGS]
    names = [part for name in COMMANDS for part in (name, *(models if name == "fit-cf" else ()))]
    parts = [f"## {name}\n\n```text\n{help_of(name)}```\n" for name in names]
    return markdown.replace(PLACE, "\n".join(parts))


def help_of(name: str) -> str:
    """What a command prints for --help."""
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse([*name.split(), "--help"])
    return printed.getvalue()
