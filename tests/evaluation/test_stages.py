"""All stages on a tiny random model: results, report, refusals, and what a second run does not do again."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.compare import compare
from evaluation.scoring import ScoreConfig, score
from megatext.data import DataError


def run(output: Path, task_file: Path, tiny_lm: Path, *more: str) -> None:
    systems = output.parent / "systems.yaml"
    systems.write_text(
        f"- {{name: other, system: other}}\n- {{name: nothing, system: empty}}\n"
        f"- {{name: AR, system: 'hf:{tiny_lm}', unconditional: 3}}\n"
        f"- {{name: AR cool, system: 'hf:{tiny_lm}', sampling: {{temperature: 0.5}}}}\n"
    )
    main(
        [
            "run",
            "--task",
            str(task_file),
            "--systems",
            str(systems),
            "--judge",
            str(tiny_lm),
            "--output",
            str(output),
            "--device",
            "cpu",
            *more,
        ]
    )


@pytest.fixture
def training_run(tmp_path: Path) -> Path:
    directory = tmp_path / "vae"
    directory.mkdir()
    lines = [{"step": i, "loss": 5 / (i + 1), "loss/kl": 0.1, "lr": 1.0} for i in range(60)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "finished.json").write_text(json.dumps({"accuracy_at_0.0": 0.99, "accuracy_at_0.5": 0.9}))
    return directory


def test_run(
    task_file: Path, tiny_lm: Path, training_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(output, task_file, tiny_lm, "--runs", str(training_run))
    printed = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    by_name = {system["name"]: system for system in results["systems"]}
    assert list(by_name) == ["human", "shuffled", "other", "nothing", "AR", "AR cool"]
    assert by_name["human"]["metrics"]["gap"]["value"] == 0 and by_name["shuffled"]["metrics"]["gap"]["value"] == 1
    assert by_name["human"]["metrics"]["rougeL"]["value"] == pytest.approx(100)
    assert by_name["human"]["metrics"]["bertscore"]["value"] == pytest.approx(100, abs=1e-3)
    assert by_name["shuffled"]["metrics"]["entropy"]["value"] == pytest.approx(
        by_name["human"]["metrics"]["entropy"]["value"], abs=0.02
    )
    nothing = by_name["nothing"]["metrics"]
    assert nothing["gap"]["value"] is None and nothing["rouge1"]["value"] == 0 and nothing["empty"]["value"] == 1
    assert by_name["AR"]["is_judge"] and not by_name["other"]["is_judge"]
    rouge = by_name["AR"]["metrics"]["rouge1"]
    assert rouge["n"] == 20 and rouge["spread"] > 0 and rouge["ci95"][0] <= rouge["value"] <= rouge["ci95"][1]
    assert re.fullmatch("[0-9a-f]{64}", results["config_hash"]) and results["command"] and results["seed"] == 0
    assert "mauve" not in by_name["AR"]["metrics"] and any(
        "MAUVE is not given: n = 20" in note for note in results["notes"]
    )
    assert [group["name"] for group in results["unconditional"]] == ["human", "AR"]
    # The table is the last thing printed; a system that judges itself carries its mark and the footnote.
    lines = printed.strip().splitlines()
    assert any(line.startswith("AR ") and "†" in line for line in lines) and any(
        line.startswith("† judges itself") for line in lines
    )
    html = (output / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3 and "http" not in re.sub(r"base64,[^\"]+", "", html)
    assert {path.name for path in (output / "plots").iterdir()} == {"quality.png", "loss_vae.png", "reconstruction.png"}
    assert (output / "table.md").read_text().count("\n| ") == 7 and "rougeL" in (output / "table.csv").read_text()
    # Nothing is made again from the same inputs; per-sample scores can be compared in pairs.
    stamp = (output / "results.json").stat().st_mtime_ns
    run(output, task_file, tiny_lm)
    assert (output / "results.json").stat().st_mtime_ns == stamp
    differences = compare((output, "human"), (output, "other"))["metrics"]
    assert differences["rougeL"]["difference"] > 0 and differences["rougeL"]["p_holm"] < 0.01

    second = tmp_path / "second"
    main(["manifest", "--task", str(task_file), "--limit", "10", "--output", str(second)])
    with pytest.raises(SystemExit):
        main(["report", "--output", str(second)])
    (second / "generations.json").write_text((output / "generations.json").read_text())
    with pytest.raises(SystemExit):
        main(["score", "--judge", str(tiny_lm), "--output", str(second)])
    assert "never compared" in capsys.readouterr().err
    (second / "results.json").write_text(
        (output / "results.json").read_text().replace(results["manifest"]["hash"], "0" * 64)
    )
    with pytest.raises(DataError, match="different manifests"):
        compare((output, "human"), (second, "other"))


def test_mauve_at_its_smallest_n(task_file: Path, tiny_lm: Path, tmp_path: Path) -> None:
    """Refused below 100 samples by default; here the limit is lowered to see the row filled."""
    pytest.importorskip("mauve", reason="mauve-text is not installed")
    from evaluation.generation import generate_all
    from evaluation.manifest import build_manifest
    from evaluation.systems import SystemEntry, complete
    from evaluation.tasks import load_task

    manifest = build_manifest(load_task(str(task_file)))
    found = generate_all(
        manifest, complete([SystemEntry("nothing", "empty")]), output=tmp_path, seed=0, judge_dir=tiny_lm, device="cpu"
    )
    config = ScoreConfig(str(tiny_lm), str(tiny_lm), metrics=("mauve",), mauve_min_samples=20, mauve_seeds=(25, 26))
    rows = [system["metrics"]["mauve"] for system in score(manifest, found, config, tmp_path)["systems"]]
    assert rows[0]["value"] == pytest.approx(100) and rows[2]["value"] < 60 and rows[1]["spread"] is not None


def test_help_is_quick_and_errors_are_one_line(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "evaluation", "run", "--help"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--judge" in done.stdout and time.monotonic() - began < 5
    assert not re.search(r"\b(torch|numpy|transformers)\b", done.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "evaluation", "manifest", "--task", "none", "--output", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: none: no such task file")
        and done.stderr.count("\n") == 1
    )
