"""The command line: `worldstride COMMAND ...`, one class of `worldstride.commands` a command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import subcommand

from worldstride import __version__
from worldstride.commands.attention import Attention
from worldstride.commands.bench import Bench
from worldstride.commands.block_recall import BlockRecall
from worldstride.commands.calibrate import Calibrate
from worldstride.commands.compare import Compare
from worldstride.commands.decisions import Decisions
from worldstride.commands.doctor import Doctor
from worldstride.commands.gate import Gate
from worldstride.commands.models import Models
from worldstride.commands.presets import Presets
from worldstride.commands.prompt import Prompt
from worldstride.commands.rollout import Rollout
from worldstride.commands.verify import Verify
from worldstride.errors import WorldstrideError

Command = (
    Annotated[Rollout, subcommand("rollout")]
    | Annotated[Prompt, subcommand("prompt")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Gate, subcommand("gate")]
    | Annotated[Decisions, subcommand("decisions")]
    | Annotated[Attention, subcommand("attention")]
    | Annotated[BlockRecall, subcommand("block-recall")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Presets, subcommand("presets")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Doctor, subcommand("doctor")]
)

USER_ERROR, INTERRUPTED, UNHEARD = 2, 130, 141
"""Exit statuses of a wrong input, of Ctrl-C, and of output that nobody read to its end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's own arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"worldstride {__version__}")
        return 0
    described = "Interactive video world models. `worldstride COMMAND --help` explains a command; --version."
    try:
        command = tyro.cli(Command, prog="worldstride", description=described, args=_spelled(arguments))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return command.run(shlex.join(["worldstride", *arguments]))
    except WorldstrideError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush is quiet too
        return UNHEARD
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _spelled(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--random-weights` as `--weights random`, and `--model NAME` as a name before all options."""
    found, model, rest = list[str](), list[str](), iter(arguments)
    for argument in rest:
        if argument == "--random-weights":
            found += ["--weights", "random"]
        elif argument == "--model":
            model = [next(rest, argument)]  # without a name it is refused like any unknown option
        elif argument.startswith("--model="):
            model = [argument.removeprefix("--model=")]
        else:
            found.append(argument)
    options = next((i for i, argument in enumerate(found) if argument.startswith("-")), len(found))
    return [*found[:options], *model, *found[options:]]


if __name__ == "__main__":
    sys.exit(main())
