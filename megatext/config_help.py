"""`--help` of the training programs: every key of a configuration, told by its dataclasses themselves."""

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
import typing
from typing import Any

_USAGE = """usage: deepspeed launch/{program} --config FILE [--section.key value ...]

  --config FILE            the run's YAML file; presets are in launch/configs/
  --deepspeed_config FILE  a file of ds_configs/; left out, the number of processes chooses
  --dry_run                print what the run would cost, try one step, keep nothing
  --section.key value      any key below; it replaces the file's

keys, their types and defaults:
"""


def usage(program: str, cls: type) -> str:
    """What a training program prints for `--help`."""
    return _USAGE.format(program=program) + "\n".join(_lines(cls, ""))


def field_docs(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass and of its bases, as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, below in itertools.pairwise(body.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        found[name] = " ".join(text.split())
    return found


def _lines(cls: type, prefix: str) -> typing.Iterator[str]:
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key, hint = prefix + field.name, hints[field.name]
        assert field.name in docs, f"{cls.__name__}.{field.name} has no text below it"
        section = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        option = key if "[]" in key else f"--{key}"  # an item of a list has no option of its own
        yield f"\n  {key}: {_type(hint)}" if section else f"  {option} {_type(hint)}, {_default(field)}"
        yield textwrap.fill(docs[field.name], 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
        if section:
            several = {dict: ".NAME", tuple: "[]"}.get(typing.get_origin(hint), "")
            yield from _lines(typing.cast(type, section), f"{key}{several}.")


def _type(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(map(str, parts))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _type(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _type(part) for part in parts)}]"
    if origin is dict:
        return f"{{NAME: {_type(parts[1])}}}"
    return "section" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def _default(field: "dataclasses.Field[Any]") -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return "needed"
    if default is None or default == "" or isinstance(default, bool):
        return json.dumps(default)
    return str(list(default) if isinstance(default, tuple) else default)
