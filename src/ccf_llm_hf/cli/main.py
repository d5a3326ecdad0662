"""The `ccf-llm` command. Heavy modules are imported inside the commands: help stays fast."""

import argparse
import contextlib
import errno
import re
import sys
from collections.abc import Sequence

from ccf_llm_hf.cli import data, doctor, share, train, use
from ccf_llm_hf.cli.arguments import CommandParser, add_json_argument
from ccf_llm_hf.cli.command import Command
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import format_json

FULL = (errno.ENOSPC, errno.EDQUOT)
# As the writers in Rust (safetensors, tokenizers) and C++ (torch) say it.
FULL_WORDS = re.compile(r"No space left|os error (28|122)|quota exceeded|file write failed", re.I)
INTERRUPTED = 130  # as a shell reports it
# In the order of the overview.
COMMANDS = {**data.COMMANDS, **train.COMMANDS, **use.COMMANDS, **share.COMMANDS, **doctor.COMMANDS}


def _overview() -> CommandParser:
    lines = "\n".join(f"  {name:<14}{command.summary}" for name, command in COMMANDS.items())
    parser = CommandParser(
        prog="ccf-llm",
        usage="ccf-llm COMMAND ... [--json]",
        description="CTR prediction that fuses a language model with collaborative filtering.",
        epilog=f"commands:\n{lines}\n\nccf-llm COMMAND --help shows its flags and an example.",
    )
    parser.add_argument("command", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str]) -> tuple[Command, argparse.Namespace, list[str]]:
    """The command that was named, its arguments, and what only `train` takes beyond them."""
    name = _overview().parse_args(argv[:1]).command
    command = COMMANDS[name]
    parser = CommandParser(
        prog=f"ccf-llm {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n  {command.example}",
    )
    parser.set_defaults(json=False)
    command.add_arguments(parser)
    add_json_argument(parser)
    arguments, rest = parser.parse_known_args(argv[1:])
    if rest and name != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return command, arguments, rest


def describe_failed_write(error: BaseException) -> str | None:
    """One sentence of an exception that comes of the disk, as of a full one; None of any other."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if getattr(cause, "errno", None) in FULL or FULL_WORDS.search(str(cause)):
            place = getattr(cause, "filename", None) or "the disk that was written to"
            return f"{place} has no space left: make room, and run the same command again to go on"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read or written ({error.strerror}): mend that"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after `error: ...` for bad input or a disk that
    cannot be written to, 130 after Ctrl-C; of `doctor` 2 too where something is to be mended."""
    try:
        command, arguments, rest = parse(list(sys.argv[1:] if argv is None else argv))
        # Libraries print to stdout at will; there it would break --json.
        with contextlib.redirect_stdout(sys.stderr):
            output = command.run(arguments, rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        sentence = describe_failed_write(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    print(format_json(output.data) if arguments.json else output.text)
    return output.code
