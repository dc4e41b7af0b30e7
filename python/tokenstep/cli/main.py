"""``tokenstep``: finds the subcommand and turns what goes wrong into an exit code and one line on stderr.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``. It is only imported when it
is the one that runs, so that help is quick and ``info`` works where torch doesn't.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tokenstep._version import __version__
from tokenstep.cli.pause import collection_paused
from tokenstep.cli.text import CommandError, as_utf8

COMMANDS = {
    "complete": "generate text after a prompt",
    "serve": "serve completions over HTTP",
    "batch": "answer a file of requests",
    "bench": "measure the ops against their floors and peers",
    "info": "show what this installation is and runs on",
}
WRONG_USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = [as_utf8(word) for word in (sys.argv[1:] if argv is None else argv)]
    command = next((word for word in words if not word.startswith("-")), None)
    prog = f"tokenstep {command}" if command in COMMANDS else "tokenstep"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale that lacks a character gets its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with collection_paused():
            parser = _parser(command)
        args = parser.parse_args(words)
        code: int = args.run(args)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        _discard_output()
        return BROKEN_PIPE
    except CommandError as error:
        print(f"{prog}: {_one_line(error)}", file=sys.stderr)
        return WRONG_USAGE
    except ModuleNotFoundError as error:
        print(f"{prog}: {error.name} is missing: pip install 'tokenstep[engine]'", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError, MemoryError, NotImplementedError, ImportError) as error:
        print(f"{prog}: {_one_line(error)}", file=sys.stderr)
        if isinstance(error, OSError):  # a full disk, perhaps
            _discard_output()
        return 1


class _Parser(argparse.ArgumentParser):
    """Refuses with one line, not with the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.prog}: {message}\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of `command` alone."""
    parser = _Parser(prog="tokenstep", description="The decode step of LLM inference, fused.")
    parser.add_argument("--version", action="version", version=f"tokenstep {__version__}")
    names = "{" + ",".join(COMMANDS) + "}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if name == command:
            module = importlib.import_module(f"tokenstep.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _discard_output() -> None:
    """Sends what stdout still holds nowhere, or the flush at exit would fail once more."""
    if sys.stdout:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
