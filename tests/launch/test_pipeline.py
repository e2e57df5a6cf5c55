"""The whole pipeline at a minute's size: every stage of the quickstart's preset, by its commands, then again."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatext.generation import SamplingConfig, TextGenerator
from megatext.generation.noise import Request
from megatext.recipes.pretrained import weights_hash
from megatext.training.cost import read_cost, total_flops
from tests.command_lines import ROOT

WORDS = ["the", "every", "small", "old", "model", "token", "noise", "step", "reads", "keeps", "learns", "and", "then"]


def corpus(path: Path) -> None:
    """Documents of about a hundred tokens, all different."""
    lines = []
    for number in range(600):
        words = [WORDS[(number * 7 + i * i + i * (number % 13)) % len(WORDS)] for i in range(40)]
        lines.append(json.dumps({"text": f"Text {number} says that " + " ".join(words) + "."}))
    path.write_text("\n".join(lines))


def tiny_preset(directory: Path) -> None:
    """The quickstart's preset with its paths moved, networks of a few thousand parameters, and a few steps."""
    preset = directory / "preset"
    shutil.copytree(ROOT / "launch/configs/quickstart", preset)
    for file in preset.glob("*.yaml"):
        text = file.read_text().replace("runs/quickstart", str(directory / "work"))
        for key, value in (("width", 32), ("heads", 2), ("layers", 3)):
            text = re.sub(rf"\b{key}: [1-9]\d*", f"{key}: {value}", text)
        text = text.replace("mlp_ratio: 2.75", "mlp_ratio: 4.0")  # the language model's width is a multiple of 64
        data = yaml.safe_load(text)
        if "max_steps" in data:
            data |= {"max_steps": 4, "save_every_steps": 2}
            data["training"] |= {"rows_per_step": 8, "micro_batch_rows": 4, "validation_every_steps": 2}
            data["data"] |= {"row_tokens": 64, "max_tokens": 64}
        file.write_text(yaml.safe_dump(data))
    stages = yaml.safe_load((preset / "stages.yaml").read_text())
    splits = "--test-fraction 0.2 --validation-fraction 0.1"
    stages |= {"options": {"train_tokenizer": "--vocab-size 300", "shard": splits}}
    (preset / "stages.yaml").write_text(yaml.safe_dump(stages))
    task = yaml.safe_load((preset / "evaluation.yaml").read_text())
    (preset / "evaluation.yaml").write_text(yaml.safe_dump(task | {"n": 8, "min_tokens": 32}))
    for file in preset.glob("systems*.yaml"):
        rows = yaml.safe_load(file.read_text())
        for row in rows:
            if row["system"].startswith("model:"):
                row["sampling"] = {"steps": 2}
                row["unconditional"] = 2
        file.write_text(yaml.safe_dump(rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One for each number of processes, with preset and corpus: recipes in it share what they stand on."""
    made = {processes: tmp_path_factory.mktemp(f"{processes}_processes") for processes in (1, 2)}
    for folder in made.values():
        tiny_preset(folder)
        corpus(folder / "corpus.jsonl")
    return made


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("recipe", "processes"), [("cola", 1), ("ldlm", 1), ("default", 2)])
def test_from_text_to_report(folders: dict[int, Path], recipe: str, processes: int) -> None:
    folder = folders[processes]
    options = ["--configs", str(folder / "preset"), "--recipe", recipe, "--corpus", str(folder / "corpus.jsonl")]
    command = [sys.executable, "launch/quickstart.py", *options, "--num_processes", str(processes)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    work = folder / "work"
    results = work if recipe == "default" else work / recipe
    assert "<html" in (results / "report.html").read_text()
    rows = [row["name"] for row in json.loads((results / "results.json").read_text())["systems"]]
    assert {"human", "shuffled", "AR T=1"} <= set(rows)
    assert "AR T=1" in first.stdout
    assert ("* started from the judge's weights" in first.stdout) == (recipe == "default")
    assert str(results / "report.html") in first.stdout
    tells_what_it_took(work / "models", recipe, json.loads((results / "results.json").read_text()))
    if recipe == "cola":
        writes_the_same_in_the_released_format(work)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "$ " not in again.stdout, "a stage was run twice"
    stages = first.stdout.count("        $ ") + first.stdout.count("done before")
    assert stages >= 10 and again.stdout.count("done before") == stages


def tells_what_it_took(models: Path, recipe: str, results: dict[str, Any]) -> None:
    """An export knows its own FLOPs and those of all models it stands on, each once; the table has their sum."""
    stands_on = {
        "default": {"lm": [], "vae": ["lm"], "token_vae": [], "dit": ["token_vae", "lm"]},
        "cola": {"vae_cola": [], "dit_cola": ["vae_cola"]},
        "ldlm": {"dit_ldlm": ["lm"]},
    }[recipe]
    own = {name: weights_hash(models / name) for name in [*stands_on, "lm"]}
    for name, others in stands_on.items():
        cost = read_cost(models / name)
        assert cost is not None and not cost["unknown"] and cost["steps"] == 4
        assert cost["flops"].keys() == {own[name], *(own[other] for other in others)}
        assert all(flops > 1e6 for flops in cost["flops"].values())
    last = list(stands_on)[-1]
    row = next(row for row in results["systems"] if row["system"] == f"model:{models / last}")
    assert row["training_flops"] == total_flops(models / last)


def writes_the_same_in_the_released_format(work: Path) -> None:
    """The preset's run, exported by the command, continues a prompt as its own format does: compared by ids, as random
    bytes that are no UTF-8 are not shown alike by all tokenizers."""
    theirs = work / "released"
    command = [sys.executable, "launch/export.py", "--run", str(work / "dit_cola"), "--output", str(theirs)]
    subprocess.run([*command, "--format", "cola-dlm"], cwd=ROOT, capture_output=True, check=True)
    sampling, written = SamplingConfig(steps=2, grid="uniform", guidance_scale=2.0), []
    for model in (work / "models" / "dit_cola", theirs):
        generator = TextGenerator.from_pretrained(model)
        written.append(list(generator._pieces([Request(generator.tokenizer.encode("Text 7 says"), 20, 0)], sampling)))
    assert written[0] == written[1] and len(written[0]) > 1
