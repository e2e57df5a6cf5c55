"""Checks a command as a reader would type it: do its targets, files, options and configuration keys exist?"""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from megatext.config import ConfigError, load_config
from megatext.recipes import config_class

ROOT = Path(__file__).parents[1]
PROGRAMS = ("make", "python", "deepspeed")
OWN_FOLDERS = ("launch/", "ds_configs/", "evaluation/", "data_tools/", "megatext/", "docs/", "tests/", "benchmarks/")


def commands(markdown: str) -> list[str]:
    """The commands in fenced and in indented code blocks: lines that start with one of PROGRAMS, after a prompt and
    assignments."""
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```|((?:^    .*\n)+)", markdown, flags=re.DOTALL | re.MULTILINE):
        for line in "".join(block).replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#\s.*", "", line.strip().removeprefix("$ "))
            words = _without_assignments(line.split())
            if words and words[0] in PROGRAMS:
                found.append(line)
    return found


def problems(command: str) -> list[str]:
    """What is wrong with a command; [] when all it names exists. Words in capitals stand for a reader's own, those with
    a $ for what a shell fills in."""
    words = _without_assignments(shlex.split(command))
    words = [word.strip("[]") for word in words if word == "" or word.strip("[]") not in ("", "...", "|")]
    for separator in ("|", "&&", ";", ">", "--slurm"):  # what follows is another program's
        if separator in words:
            words = words[: words.index(separator)]
    files = [word for word in words if word.startswith(OWN_FOLDERS) and "$" not in word]
    missing = [f"{word}: no such file" for word in files if not (ROOT / word).exists()]
    if missing:
        return missing
    program, *arguments = words
    if program == "make":
        return _make_problems(arguments)
    if program == "deepspeed":
        while arguments and arguments[0].startswith("--"):
            arguments = arguments[1 if "=" in arguments[0] or arguments[0] == "--quiet" else 2 :]
    if not arguments or arguments[0] == "-c":
        return []
    if arguments[0] == "-m":
        return _module_problems(arguments[1], arguments[2:])
    return _script_problems(arguments[0], arguments[1:])


def _make_problems(arguments: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z_-]+):", makefile, flags=re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.MULTILINE)
    return [
        f"make: no {'variable' if '=' in word else 'target'} {word}"
        for word in arguments
        if word.partition("=")[0] not in (variables if "=" in word else targets)
    ]


def _module_problems(module: str, arguments: list[str]) -> list[str]:
    if importlib.util.find_spec(module) is None:
        return [f"no module {module}"]
    return _option_problems(("-m", module), arguments) if module.split(".")[0] in ("data_tools", "evaluation") else []


def _script_problems(script: str, arguments: list[str]) -> list[str]:
    if not (ROOT / script).is_file():
        return [f"{script}: no such file"]
    if not re.fullmatch(r"launch/pretrain_\w+\.py", script):
        return _option_problems((script,), arguments)
    if any(word.isupper() or "$" in word for word in arguments):
        return []
    try:
        load_config(config_of(script), arguments)
    except ConfigError as error:
        return [str(error)]
    return []


def config_of(script: str) -> type:
    """The configuration a launcher reads, which it names."""
    (name,) = re.findall(r'launch\("(Pretrain\w+Config)"', (ROOT / script).read_text())
    return config_class(name)


def _option_problems(program: tuple[str, ...], arguments: list[str]) -> list[str]:
    help_text = _help(program)
    if arguments and arguments[0].isalpha() and re.search(rf"^ +{arguments[0]} ", help_text, flags=re.MULTILINE):
        help_text = _help((*program, arguments[0]))
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return [
        f"{' '.join(program)}: no option {option}"
        for option in options
        if not re.search(rf"{re.escape(option)}(?![\w-])", help_text)
    ]


@functools.cache
def _help(program: tuple[str, ...]) -> str:
    result = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(program)} --help failed: {result.stderr}"
    return result.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words
