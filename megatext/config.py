"""A run's configuration: YAML and dotted command-line overrides become frozen, typed, nested dataclasses.

Each section's dataclass lives beside what it configures. Here is only how it is read: every key must exist (or the
error suggests the one that was meant), every value must have the type of its field, and every error names the file
or the option it came from.
"""

import dataclasses
import difflib
import math
import os
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import dacite
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is one line for the user: where, what, and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on. The message is for the user; every rank raises it."""


@dataclass(frozen=True)
class Flags:
    """What a launcher is told besides the configuration."""

    config: Path
    """The YAML file that was read."""
    deepspeed_config: Path | None = None
    """A file of ds_configs/; None chooses by the number of processes."""
    dry_run: bool = False
    """Print what the run would cost, run one tiny step, stop."""


def load_config(cls: type[T], argv: list[str]) -> tuple[T, Flags]:
    """Read `--config FILE [--deepspeed_config FILE] [--dry_run] [--section.key value ...]` into a `cls`.

    `--local_rank N`, which DeepSpeed's launcher may add, is accepted and not needed: the rank is taken from the
    environment. Raises ConfigError.
    """
    own: dict[str, str] = {}
    overrides: dict[str, str] = {}
    dry_run = False
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--"):
            raise ConfigError(f"{argument!r}: expected an option, written --section.key value")
        name, equals, value = argument[2:].partition("=")
        if name == "dry_run" and not equals:
            dry_run = True
            continue
        if not equals:
            try:
                value = next(arguments)
            except StopIteration:
                raise ConfigError(f"--{name}: a value is missing") from None
        (own if name in ("config", "deepspeed_config", "local_rank") else overrides)[name] = value
    if "config" not in own:
        raise ConfigError("--config FILE is required (presets are in launch/configs/; --help lists all keys)")
    path = Path(own["config"])
    data = read_yaml(path)
    for name, value in overrides.items():
        _check_known(cls, _nest(name, None), f"--{name}", extra=("config", "deepspeed_config", "dry_run"))
        section = data
        *parents, leaf = name.split(".")
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[leaf] = _parse_value(name, value)
    data = _resolve(data, str(path))
    config = from_dict(cls, data, where=str(path) + (" and the command line" if overrides else ""))
    deepspeed_config = Path(own["deepspeed_config"]) if "deepspeed_config" in own else None
    return config, Flags(path, deepspeed_config, dry_run)


def from_dict(cls: type[T], data: dict[str, Any], where: str) -> T:
    """Build a `cls` from plain nested dicts and lists; `where` begins every error message. Raises ConfigError."""
    _check_known(cls, data, where)
    options = dacite.Config(cast=[tuple], type_hooks={float: _as_float}, strict=True)
    try:
        return dacite.from_dict(cls, data, options)  # type: ignore[type-var]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except dacite.MissingValueError as error:
        raise ConfigError(f"{where}: key '{error.field_path}' is missing") from None
    except dacite.WrongTypeError as error:
        wanted = str(getattr(error.field_type, "__name__", error.field_type)).replace("typing.", "")
        if typing.get_origin(error.field_type) is typing.Literal or isinstance(error.field_type, types.UnionType):
            wanted = str(error.field_type).replace("typing.", "")
        raise ConfigError(f"{where}: key '{error.field_path}' is {error.value!r}, which is not a {wanted}") from None
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dicts and lists of a configuration: what from_dict reads back to an equal object."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def save_yaml(config: Any, path: Path) -> None:
    """Write the resolved configuration; the file can be given to --config again."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), encoding="utf-8")


@contextmanager
def cli_errors() -> Iterator[None]:
    """Around a program's main: bad configuration, bad data and files that cannot be read or written end in one line
    `error: ...` and exit status 1."""
    from megatext.data import DataError

    try:
        yield
    except (ConfigError, DataError, RunError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or isinstance(error, DataError):  # the others are alike on all ranks
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        print(f"error: {told}", file=sys.stderr, flush=True)
        sys.exit(1)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's keys and values; what is to be interpolated in it is as it was written. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level")
    return typing.cast(dict[str, Any], data)


def _parse_value(name: str, text: str) -> Any:
    if not text:
        return ""  # null is how None is written
    try:
        # OmegaConf's YAML grammar, so that 1e-4 is a float here as it is in a file.
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"--{name} {text}: {' '.join(str(error).split())}") from None


def _resolve(data: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(data), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _section_class(annotation: Any) -> type | None:
    """The dataclass that a field holds, also where the field is optional; None for plain values."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate
    return None


def _check_known(cls: type, data: dict[str, Any], where: str, prefix: str = "", extra: tuple[str, ...] = ()) -> None:
    known = _field_types(cls)
    for key, value in data.items():
        path = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), [*known, *extra], n=1)
            hint = f"; did you mean '{prefix}{close[0]}'?" if close else f"; known here: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key '{path}'{hint}")
        section = _section_class(known[key])
        if section is not None and isinstance(value, dict):
            by_name = typing.get_origin(known[key]) is dict
            items = {f"{path}.{name}.": item for name, item in value.items()} if by_name else {f"{path}.": value}
            for place, item in items.items():
                _check_known(section, item if isinstance(item, dict) else {}, where, place)


def _as_float(value: Any) -> Any:
    """Whole numbers are floats too; nothing else is converted."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError("a value is not a number (nan)")
    return value
