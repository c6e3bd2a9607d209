"""Parses `name=value,name=value`, the form of lmms-eval's `--model_args` and `--gen_kwargs`.

lmms-eval splits the text at commas outside quotes and brackets. It then ends with a traceback where a part
has no `=`, keeps quotes as a part of the value, and takes a list for one literal string.
"""

import inspect
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from lmms_eval.utils import _smart_comma_split, handle_arg_string

from hones_eval.core.files import check_folder
from hones_eval.errors import HonesError

_SHORT_NAMES = "strength|attach|scope|condition|allow_noop|base|device_map|dtype"
BEFORE_NAMES = rf"steering|pretrained|(?<![A-Za-z0-9_])(?:{_SHORT_NAMES})"
"""Names that inside another value, followed by `=`, show that a comma is missing before them."""


def parsed(text: str, flag: str = "--model_args") -> dict[str, Any]:
    """The names and values of a text like `pretrained=org/model,dtype=float32`.

    A value with a comma is quoted: `pretrained='/models/a,b'`. A list or mapping is JSON: `until=["a","b"]`.

    Args:
        text: as it was given.
        flag: whose value it is, for messages.

    Raises: HonesError for a part without `=`, an empty name, a repeated name, or a missing comma.
    """
    found: dict[str, Any] = {}
    for part in _smart_comma_split(text.strip()):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise HonesError(
                f"{flag}: {part!r} should have the form name=value; a value with a comma is quoted, "
                "as in name='a,b'"
            )
        if name in found:
            raise HonesError(f"{flag}: {name} is given twice")
        found[name] = _value(name, value, flag)
    return found


def check_arguments(cls: type, given: Mapping[str, Any], name: str) -> None:
    """Check the arguments of a wrapper before it loads anything.

    Args:
        cls: the wrapper's class.
        given: its arguments by name.
        name: what messages call it.

    Raises: HonesError for a misspelt name, a batch size that is not a number, or a folder that is missing.
    """
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    parameters = [
        parameter for one in constructors for parameter in inspect.signature(one).parameters.values()
    ]
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
    for argument in given:
        near = get_close_matches(argument, sorted(known), n=1)
        if argument not in known and near:
            raise HonesError(f"{name} has no argument {argument!r}: did you mean {near[0]}?")
    batch_size = given.get("batch_size", 1)
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise HonesError(f"batch_size={batch_size}: {name} takes a whole number of at least 1")
    for argument in ("pretrained", "peft"):
        check_folder(argument, given.get(argument))


def parsed_settings(text: str) -> dict[str, Any]:
    """The settings of a `--gen_kwargs`; see `parsed`."""
    return parsed(text, "--gen_kwargs")


def _value(name: str, value: str, flag: str) -> Any:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    missing = re.search(f"({BEFORE_NAMES})=", value)
    if missing:
        raise HonesError(
            f"{flag}: {name}={value}: a comma is missing before {missing.group(1)}= (quote the value if this "
            "is a part of it)"
        )
    if value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return _literal(name, value, flag)
    return handle_arg_string(value)


def _literal(name: str, value: str, flag: str) -> Any:
    """A list or mapping in Python's notation, as in `until=['a','b']`."""
    from ast import literal_eval

    try:
        return literal_eval(value)
    except (ValueError, SyntaxError):
        raise HonesError(f"{flag}: {name}={value} is not a list or mapping: write it as JSON") from None
