"""Command lines: each command has its own usage line and help, and answers before anything heavy is imported.

A room's `__main__` maps names to functions by their place, "eval.retrieval.command:retrieval"; the module of
a command imports torch and its like inside its function, so that --help takes a fraction of a second.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from data_prep.atomic import check_output
from data_prep.errors import UserError
from data_prep.rooms import importable
from data_prep.store.remote import place_of
from data_prep.terminal import say

# Switches are switches (--overwrite), and no flag carries the name of the dataclass that it belongs to.
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)

# A parameter without a flag: what follows `--` on the command line, for another command.
Rest = tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]]


@dataclass(frozen=True)
class Output:
    """Marks a parameter that a command writes to: run_command checks the place before the command starts."""

    is_folder: bool = False


# What help calls the things that commands take.
Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]


def _place(metavar: str) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: place_of(words[0]),
        is_instance=lambda value: isinstance(value, (str, Path)),
        str_from_instance=lambda place: [str(place)],
    )


Shards = Annotated[Path | str, _place("SHARDS")]  # a folder, or its URL
ShardsOrImages = Annotated[Path | str, _place("SHARDS|FOLDER")]
Index = Annotated[Path, tyro.conf.arg(metavar="INDEX")]
Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Runs = Annotated[Path, tyro.conf.arg(metavar="RUNS")]
RecipeFile = Annotated[Path, tyro.conf.arg(metavar="RECIPE")]
File = Annotated[Path, tyro.conf.arg(metavar="FILE")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
FolderOrUrl = Annotated[Path | str, _place("FOLDER|URL")]
OptionalFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
OutputFile = Annotated[Path, tyro.conf.arg(metavar="FILE"), Output()]
OptionalOutputFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE"), Output()]
OutputFolder = Annotated[Path, tyro.conf.arg(metavar="FOLDER"), Output(is_folder=True)]
OptionalOutputFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER"), Output(is_folder=True)]
OptionalShards = Shards | None


def run_command(
    command: Callable, prog: str, arguments: list[str] | None = None, guide: str | None = None
) -> object:
    """Call `command` with the command line's arguments.

    Args:
        prog: of the usage line, "python -m eval retrieval".
        arguments: sys.argv[1:] by default.
        guide: text above the options in --help; the docstring of `command` by default.
    """
    arguments = with_quoted_options(sys.argv[1:] if arguments is None else arguments)
    return tyro.cli(
        with_checked_outputs(command), prog=prog, args=arguments, description=guide, config=CONFIG
    )


def with_checked_outputs(command: Callable) -> Callable:
    """`command`, refusing what it could not write to at the end.

    Raises:
        UserError: a place cannot be written to, or two outputs are one file.
    """
    function = command.func if isinstance(command, functools.partial) else command
    outputs = {
        name: mark
        for name, hint in get_type_hints(function, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Output)
    }
    if not outputs:
        return command

    @functools.wraps(command)
    def checked(**options):
        files: dict[Path, str] = {}
        for name, mark in outputs.items():
            if (path := options.get(name)) is None:
                continue
            option = f"--{name.replace('_', '-')}"
            check_output(option, path, mark.is_folder)
            if other := files.get(path.absolute()):
                raise UserError(f"{other} and {option}: both are {path}; pass two files")
            if not mark.is_folder:
                files[path.absolute()] = option
        return command(**options)

    return checked


def with_quoted_options(arguments: list[str]) -> list[str]:
    """`--build "--image-column file"` as one argument with `=`; tyro would take the options for flags."""
    joined: list[str] = []
    for argument in arguments:
        quoted = argument.startswith("--") and " " in argument.partition("=")[0]
        if quoted and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def print_guide(usage: str, guide: str) -> None:
    """What a command without arguments prints: its usage line and its module's docstring."""
    say(f"usage: {usage}\n\n{guide.strip()}")


def run_commands(prog: str, guide: str, commands: dict[str, str], rest: str = "") -> None:
    """Run the command that sys.argv[1] names; without one, or with --help alone, print the guide.

    Args:
        prog: "python -m eval".
        guide: what the room can do, with examples; the room's own docstring.
        commands: "module:function" by the name of the command.
        rest: the parameter, of those commands that have it, that gets the words after `--` (see Rest).

    Raises:
        UserError: no such command, or words after `--` for a command that takes none.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        say(f"usage: {prog} COMMAND [OPTIONS]      {prog} COMMAND --help\n\n{guide.strip()}")
        return
    known = name.replace("_", "-")
    if known not in commands:
        raise UserError(f"{prog} {name}: no such command; it can be {', '.join(commands)}")
    run_place(commands[known], f"{prog} {known}", arguments, rest)


def run_place(place: str, prog: str, arguments: list[str], rest: str = "") -> None:
    """Run the function at "module:function"; the rest is as in run_commands."""
    module, _, function = place.partition(":")
    command = getattr(importlib.import_module(importable(module)), function)
    if rest and "--" in arguments:
        if rest not in inspect.signature(command).parameters:
            raise UserError(f"{prog}: takes nothing after --")
        end = arguments.index("--")
        command = functools.partial(command, **{rest: tuple(arguments[end + 1 :])})
        arguments = arguments[:end]
    run_command(command, prog, arguments)
