"""Every command that README.md and docs/ show refers to targets, files, options and keys that exist."""

import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from evaluation.systems import load_systems
from megatext.config import load_config
from tests.command_lines import ROOT, commands, config_of, problems

PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if path.is_file()]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_of_the_documentation(page: Path) -> None:
    wrong = {command: found for command in commands(page.read_text()) if (found := problems(command))}
    assert not wrong


def test_the_readme_shows_the_way() -> None:
    shown = {" ".join(command.split()[:2]) for command in commands((ROOT / "README.md").read_text())}
    programs = ("make quickstart", "make test", "python launch/generate.py", "python launch/export.py", "python -m")
    assert {*programs, "deepspeed launch/pretrain_vae.py", "deepspeed launch/pretrain_dit.py"} <= shown


@pytest.mark.parametrize("folder", ["megatext", "data_tools", "evaluation"])
def test_the_file_map_names_every_file(folder: str) -> None:
    page = (ROOT / "docs/files.md").read_text()
    part = page[page.index(f"\n`{folder}/`") :]
    rows = part[: part.index("\n\n", part.index("| file |"))]
    named = {name.removeprefix("metrics/") for name in re.findall(r"`([\w/]+\.py)`", rows)}
    files = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}
    files = {name.removeprefix("metrics/") for name in files}
    assert {n for n in named if "__init__" not in n} == {n for n in files if "__init__" not in n}


def test_commands_are_found_where_readers_see_them() -> None:
    page = """
Text with `make nothing` inline.
```bash
$ make setup   # a comment
NUM_PROCESSES=2 make quickstart
deepspeed --num_gpus 2 launch/pretrain_dit.py \\
    --config launch/configs/quickstart/dit.yaml
cat results.json
```
make outside
"""
    assert commands(page) == [
        "make setup",
        "NUM_PROCESSES=2 make quickstart",
        "deepspeed --num_gpus 2 launch/pretrain_dit.py      --config launch/configs/quickstart/dit.yaml",
    ]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make quickstart RECIPE=default NUM_PROCESSES=2", None),
        ("make quikstart", "no target quikstart"),
        ("make quickstart RECIP=default", "no variable RECIP=default"),
        ("python launch/none.py --config FILE", "launch/none.py: no such file"),
        ("python -m data_tools.none", "no module data_tools.none"),
        ("python launch/quickstart.py --configs launch/configs/quickstart --num_processes 2", None),
        ("python launch/quickstart.py --num-processes 2", "no option --num-processes"),
        ("deepspeed launch/pretrain_lm.py --config FILE [--section.key value ...]", None),
        ("deepspeed --num_gpus 2 launch/pretrain_lm.py --config launch/configs/quickstart/lm.yaml --seed 1", None),
        ("deepspeed launch/pretrain_lm.py --config launch/configs/quickstart/lm.yaml --max_step 1", "max_steps"),
        ("deepspeed launch/pretrain_lm.py --config launch/configs/nowhere/lm.yaml", "no such file"),
    ],
)
def test_problems_are_told(command: str, complaint: str | None) -> None:
    found = problems(command)
    if complaint is None:
        assert found == []
    else:
        assert complaint in found[0]


def test_the_commands_of_the_paper_s_tables_fit_together(tmp_path: Path) -> None:
    """The page's shell code with programs that only say what they were called with: every model that is read was made
    before, and every row of the two tables is one of them."""
    page = (ROOT / "docs/textldm.md").read_text()
    part = page[page.index("## The paper's tables") : page.index("What they take, by")]
    code = textwrap.dedent("".join(re.findall(r"^    .*\n", part, flags=re.MULTILINE)))
    echo = 'deepspeed() { printf "%s\\x1f" deepspeed "$@"; echo; }; python() { printf "%s\\x1f" python "$@"; echo; }\n'
    shell = subprocess.run(  # without a PATH and elsewhere, so that no other program is run
        [shutil.which("bash") or "bash", "-eu", "-c", echo + code],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={"PATH": ""},
    )  # fmt: skip
    told = shell.stdout
    runs: list[str] = []
    models: list[str] = []
    for line in told.splitlines():
        program, script, *arguments = line.split("\x1f")[:-1]
        if script.startswith("launch/pretrain_"):
            config, _ = load_config(config_of(script), arguments)
            assert config.run_dir not in runs
            assert not hasattr(config, "dit") or config.dit.vae in models
            runs.append(config.run_dir)
        elif script == "launch/export.py":
            assert arguments[:2] == ["--run", runs[-1]] and arguments[2] == "--output"
            models.append(arguments[3])
    assert len(runs) == 6 + 20
    for table in ("systems_table1", "systems_table2"):
        assert f"launch/configs/textldm/{table}.yaml" in told
        rows = load_systems(ROOT / f"launch/configs/textldm/{table}.yaml")
        own = {row.system.partition(":")[2] for row in rows if "runs/" in row.system}
        assert own <= set(models) and len(own) >= 5


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_of_the_documentation_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link
