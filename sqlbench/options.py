"""Command line generated from settings: each field is an option, and pydantic validates its value."""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import get_annotations, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast, get_args, get_origin

from pydantic import ValidationError, create_model

from sqlbench import __version__
from sqlbench.config import Settings

Function = TypeVar("Function", bound=Callable[..., None])
COMMANDS: dict[str, tuple[type[Settings], Callable[..., None]]] = {}
"""Options and function of each command, by its name."""
UNSAID = ("None", "False", "[]", "PydanticUndefined")
"""Defaults that a help text does not print."""


class Parser(ArgumentParser):
    """Refuses an invalid command line with a message of one line and status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end the process."""
        self.exit(2, f"error: {' '.join(message.split())}; see '{self.prog} --help'\n")


def command(name: str) -> Callable[[Function], Function]:
    """Register a function as a command: its options are its parameters and the fields of the parameter `settings`.

    Its help text is the docstring of the function, or else of the settings.
    """

    def add(function: Function) -> Function:
        parameters = dict(signature(function, eval_str=True).parameters)
        base = parameters.pop("settings").annotation if "settings" in parameters else Settings
        fields: Any = {n: (p.annotation, ... if p.default is p.empty else p.default) for n, p in parameters.items()}
        text = function.__doc__ or base.__doc__
        model = create_model(function.__name__, __base__=base, __doc__=text, **fields)
        COMMANDS[name] = cast(type[Settings], model), function
        return function

    return add


def send_request(request: str | None) -> None:
    """Pass request fields to the models of this process and its children, through the environment."""
    if request is not None:
        from sqlbench.models.chat import REQUEST, read_request

        read_request(request)
        os.environ[REQUEST] = request


def run_command(
    groups: Mapping[str, str],
    arguments: Sequence[str] | None,
    sections: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Run the requested command; end the process after a help text or for an invalid command line.

    Args:
        groups: description of each group of commands; the program itself is the group ``""``, which comes first.
        arguments: the command line; None for the process's own.
        sections: commands and groups by the title under which the help lists them.
    """
    parsed, extra = _parser(groups, sections).parse_known_args(arguments)
    values = vars(parsed)
    parser, name = values.pop("_parser"), values.pop("_command")
    if name is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    model, function = COMMANDS[name]
    if "overrides" in model.model_fields and not any(text.startswith("-") for text in extra):
        values["overrides"] = values.get("overrides", []) + extra  # argparse itself takes only adjacent ones
    elif extra:
        near = get_close_matches(extra[0], [flag for name in model.model_fields for flag in _flags(model, name)], 1)
        parser.error(f"unknown argument: {' '.join(extra)}{f'; did you mean {near[0]}?' if near else ''}")
    try:
        checked = model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        value = "" if first["type"] == "missing" else f", not {first['input']!r}"
        name = str(first["loc"][0])
        flag = (_flags(model, name) or [name])[0]
        parser.error(f"'{flag}': {first['msg'][0].lower()}{first['msg'][1:]}{value}")
    params = signature(function, eval_str=True).parameters
    call = {name: getattr(checked, name) for name in params if name != "settings"}
    if "settings" in params:
        call["settings"] = params["settings"].annotation(**{n: v for n, v in values.items() if n not in params})
    function(**call)


def _parser(groups: Mapping[str, str], sections: Mapping[str, Sequence[str]]) -> Parser:
    texts = {name: re.split("[;:.,]", model.__doc__ or "")[0] for name, (model, _) in COMMANDS.items()}
    for group, text in groups.items():
        members = ", ".join(name.split()[1] for name in COMMANDS if name.startswith(f"{group} "))
        texts[group] = f"{text.rstrip('.')} ({members})"
    lines = [groups[""], ""]
    listed = {name for names in sections.values() for name in names}
    more = [name for name in texts if name and " " not in name and name not in listed]
    for title, names in [*sections.items(), *([("More", more)] if more else [])]:
        lines += [f"{title}:", *(f"  {name:10} {texts[name]}" for name in names if name in texts)]
    lines += ["", "sqlbench COMMAND --help lists the options of a command."]
    root = Parser(
        prog="sqlbench",
        usage="sqlbench [-h] [-V] COMMAND ...",
        description="\n".join(lines),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("-V", "--version", action="version", version=f"sqlbench {__version__}")
    below: dict[str, Any] = {}
    for group, text in groups.items():
        parser = below[""].add_parser(group, help=text, description=text) if group else root
        parser.set_defaults(_parser=parser, _command=None)
        shown: dict[str, Any] = {} if group else {"help": SUPPRESS, "prog": "sqlbench"}  # the sections list them
        below[group] = parser.add_subparsers(title="commands", metavar="COMMAND", **shown)
    for name, (model, _) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        parser = below[group].add_parser(last, help=model.__doc__, description=model.__doc__, allow_abbrev=False)
        parser.set_defaults(_parser=parser, _command=name)
        _add_options(parser, model)
    return root


def _add_options(parser: Parser, model: type[Settings]) -> None:
    sections: dict[str | None, Any] = {None: parser}
    for name, field in model.model_fields.items():
        flags, kinds = _flags(model, name), {field.annotation, *get_args(field.annotation)}
        how: dict[str, Any] = {"metavar": "N" if kinds & {int, float} else "PATH" if Path in kinds else "TEXT"}
        if not flags:
            how = {"metavar": "KEY=VALUE", "nargs": "*"} if get_origin(field.annotation) is list else {}
        elif bool in kinds:
            how = {"action": "store_true" if field.default is False else BooleanOptionalAction}
        elif get_origin(field.annotation) is list:
            how["action"] = "append"
        notes = ["required"] * field.is_required()
        notes += [f"default: {field.default}"] * (str(field.default) not in UNSAID)
        notes += [f"at least {bound.ge}" for bound in field.metadata if hasattr(bound, "ge")]
        notes += [f"at most {bound.le:g}" for bound in field.metadata if hasattr(bound, "le")]
        text = " ".join([field.description or "", f"[{', '.join(notes)}]" if notes else ""]).strip().replace("%", "%%")
        title = next(vars(owner).get("heading") for owner in model.__mro__ if name in get_annotations(owner))
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        if flags:
            how["dest"] = name
        sections[title].add_argument(*(flags or [name]), default=SUPPRESS, help=text, **how)


def _flags(model: type[Settings], name: str) -> list[str]:
    extra: Any = model.model_fields[name].json_schema_extra
    return extra["flags"] if extra else ["--" + name.replace("_", "-")]
