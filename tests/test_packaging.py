"""What is imported is pinned, what is pinned is exact, and make's targets exist."""

import ast
import importlib.metadata
import re
import sys
import tomllib

from tests.command_lines import ROOT

OWN = ("megatext", "data_tools", "evaluation", "launch")


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*", line) for line in lines), f"{name}: pin exactly"
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def imports(*folders: str) -> set[str]:
    found: set[str] = set()
    for folder in folders:
        for file in (ROOT / folder).glob("**/*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found - {*OWN, "tests", "setuptools"} - set(sys.stdlib_module_names)


def distributions(modules: set[str]) -> set[str]:
    known = importlib.metadata.packages_distributions()
    return {re.sub(r"[-_.]+", "-", known.get(module, [module])[0]).lower() for module in modules}


def test_everything_imported_is_pinned() -> None:
    run, development = pins("requirements.txt"), pins("requirements-dev.txt")
    assert not run.keys() & development.keys()
    plugins = {"lm-eval"}  # who plugs our models into lm-eval has it
    assert not distributions(imports(*OWN)) - run.keys() - plugins and plugins <= development.keys()
    assert not distributions(imports("tests")) - run.keys() - development.keys()
    assert next(iter(run)) == "torch"


def test_packages_are_found_and_carry_their_files() -> None:
    from setuptools import find_packages

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = set(find_packages(str(ROOT), include=include))
    for top in ("megatext", "data_tools", "evaluation"):
        folders = {file.parent.relative_to(ROOT) for file in (ROOT / top).glob("**/*.py")}
        assert {".".join(folder.parts) for folder in folders} <= packages, "a folder with code lacks __init__.py"
    data = project["tool"]["setuptools"]["package-data"]
    for top in ("megatext", "data_tools", "evaluation"):
        for file in (path for path in (ROOT / top).glob("**/*") if path.suffix in (".yaml", ".j2", ".json")):
            inside = file.relative_to(ROOT / top)
            assert any(inside.match(pattern) for pattern in data[top]), f"{file} is not installed with its package"
