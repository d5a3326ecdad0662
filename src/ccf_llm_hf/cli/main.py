"""The `ccf-llm` command. Heavy modules are imported inside the commands: help stays fast."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from ccf_llm_hf.cli import data, share, train, use
from ccf_llm_hf.cli.arguments import CommandParser, add_json_argument
from ccf_llm_hf.cli.command import Command
from ccf_llm_hf.errors import InputError

INTERRUPTED = 130  # as a shell reports it
# In the order of the overview.
COMMANDS = {**data.COMMANDS, **train.COMMANDS, **use.COMMANDS, **share.COMMANDS}


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after `error: ...` for bad input, 130 after
    Ctrl-C."""
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
    print(json.dumps(output.data, indent=2) if arguments.json else output.text)
    return 0
