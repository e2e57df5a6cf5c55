"""All stages on tiny random models: results, report, refusals, and what a second run does not do again."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation.__main__ import main
from evaluation.compare import compare, comparison_table
from evaluation.generation import Settings, generate_all, load_generations
from evaluation.manifest import load_manifest
from evaluation.metrics.encoder import Encoder
from evaluation.scoring import ScoreConfig, load_results, score
from evaluation.systems import SystemEntry, complete
from megatext.data import DataError
from tests.evaluation.conftest import make_texts

ROOT = Path(__file__).parents[2]


def run(output: Path, task_file: Path, tiny_lm: Path, *more: str) -> None:
    systems = output.parent / "systems.yaml"
    systems.write_text(
        f"- {{name: other, system: other}}\n- {{name: nothing, system: empty}}\n"
        f"- {{name: AR, system: 'hf:{tiny_lm}', unconditional: 3}}\n"
        f"- {{name: AR cool, system: 'hf:{tiny_lm}', sampling: {{temperature: 0.5}}}}\n"
    )
    models = [option for name in ("judge", "featuriser", "bertscore-model") for option in (f"--{name}", str(tiny_lm))]
    arguments = ["run", "--task", str(task_file), "--systems", str(systems), *models, "--output", str(output)]
    main([*arguments, "--device", "cpu", *more])


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
    whole = tmp_path / "out"
    output = whole / "tiny"
    run(whole, task_file, tiny_lm, "--runs", str(training_run))
    printed = capsys.readouterr().out
    results = load_results(output)
    by_name = {system["name"]: system for system in results["systems"]}
    assert list(by_name) == ["human", "shuffled", "other", "nothing", "AR", "AR cool"]
    check_sanity_rows({name: system["metrics"] for name, system in by_name.items()})
    whole_sampling = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
    assert by_name["AR cool"]["sampled_by"] == whole_sampling and by_name["human"]["sampled_by"] is None
    assert by_name["AR"]["is_judge"] and not by_name["other"]["is_judge"]
    rouge = by_name["AR"]["metrics"]["rouge1"]
    assert rouge["n"] == 20 and rouge["spread"] > 0 and rouge["ci95"][0] <= rouge["value"] <= rouge["ci95"][1]
    assert re.fullmatch("[0-9a-f]{64}", results["config_hash"]) and results["command"] and results["seed"] == 0
    assert any("MAUVE is not given: n = 20" in note for note in results["notes"])
    assert [group["name"] for group in results["unconditional"]] == ["human", "AR"]
    lines = printed.splitlines()
    assert any(line.startswith("AR ") and "†" in line for line in lines)
    assert any(line.startswith("† judges itself") for line in lines)
    html = (whole / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 5 and "http" not in re.sub(r"base64,[^\"]+", "", html)
    plots = {"tiny_metrics", "tiny_lengths", "tiny_quality", "loss_vae", "reconstruction"}
    assert {path.stem for path in (whole / "plots").iterdir()} == plots
    assert (whole / "table.md").read_text().count("\n| AR") == 4 and "rougeL" in (whole / "table.csv").read_text()
    # Nothing is made again from the same inputs.
    stamp = (output / "results.json").stat().st_mtime_ns
    run(whole, task_file, tiny_lm)
    assert (output / "results.json").stat().st_mtime_ns == stamp


def check_sanity_rows(rows: dict[str, dict[str, Any]]) -> None:
    human, shuffled, nothing = rows["human"], rows["shuffled"], rows["nothing"]
    assert human["gap"]["value"] == 0 and shuffled["gap"]["value"] == 1
    assert human["rougeL"]["value"] == pytest.approx(100)
    assert human["bertscore"]["value"] == pytest.approx(100, abs=1e-3)
    assert human["length_ratio"]["value"] == 1 and nothing["length_ratio"]["value"] == 0
    assert shuffled["entropy"]["value"] == pytest.approx(human["entropy"]["value"], abs=0.02)
    assert nothing["gap"]["value"] is None and nothing["generative_perplexity"]["value"] is None
    assert nothing["rouge1"]["value"] == 0 and nothing["empty"]["value"] == 1 and nothing["bertscore"]["value"] == 0
    for row in rows.values():
        if row["nll"]["value"] is not None:
            assert row["generative_perplexity"]["value"] == pytest.approx(2.718281828 ** row["nll"]["value"], rel=1e-6)


def test_results_of_other_manifests_are_refused_everywhere(
    task_file: Path, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "out", task_file, tiny_lm, "--metrics", "rouge,diversity")
    first, second = tmp_path / "out" / "tiny", tmp_path / "second"
    main(["manifest", "--task", str(task_file), "--limit", "10", "--output", str(second)])
    for name in ("generations.json", "results.json", "samples.jsonl"):
        (second / name).write_text((first / name).read_text())
    for stage in (["score", "--metrics", "rouge", "--output", str(second)], ["report", "--output", str(second)]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(stage)
        assert re.search("never compared|score again", capsys.readouterr().err)
    with pytest.raises(DataError, match="score again"):
        compare([(first, "human"), (second, "other")])
    (second / "generations.json").unlink()
    main(["generate", "--output", str(second), "--system", "other=other"])
    main(["score", "--output", str(second), "--metrics", "rouge"])
    with pytest.raises(DataError, match="different manifests"):
        compare([(first, "human"), (second, "other")])
    results = json.loads((second / "results.json").read_text())
    third = tmp_path / "third"
    main(["manifest", "--task", str(task_file), "--limit", "10", "--output", str(third)])
    main(["generate", "--output", str(third), "--system", "other=other"])
    main(["score", "--output", str(third), "--metrics", "rouge", "--stem"])
    with pytest.raises(DataError, match="settings of stem"):
        compare([(third, "human"), (second, "other")])
    # A kill between the two files of `score` leaves other texts than the numbers were made from.
    (second / "samples.jsonl").write_text((second / "samples.jsonl").read_text().replace("the", "a"))
    with pytest.raises(DataError, match="not the texts that"):
        load_results(second)
    main(["score", "--output", str(second), "--metrics", "rouge"])
    assert load_results(second)["systems"] == results["systems"]
    (second / "results.json").write_text(json.dumps({**results, "schema_version": 1}))
    with pytest.raises(DataError, match="another version"):
        load_results(second)
    with pytest.raises(SystemExit):
        main(["report", "--output", str(tmp_path / "both"), "--results", str(first), str(first)])
    assert "two results of the task tiny" in capsys.readouterr().err


@pytest.fixture
def scored(task_file: Path, tiny_lm: Path, tmp_path: Path) -> Path:
    """A directory with MAUVE at a lowered limit of 20 samples, and BERTScore with idf."""
    pytest.importorskip("mauve", reason="mauve-text is not installed")
    main(["manifest", "--task", str(task_file), "--output", str(tmp_path)])
    entries = [SystemEntry("other", "other"), SystemEntry("nothing", "empty"), SystemEntry("AR", f"hf:{tiny_lm}")]
    score_again(tmp_path, tiny_lm, entries)
    return tmp_path


def score_again(output: Path, model: Path, entries: list[SystemEntry], **config: Any) -> dict[str, Any]:
    manifest, cache = load_manifest(output), output / "cache"
    found = generate_all(manifest, complete(entries, model), Settings(judge=model, cache=cache), output)
    settings = ScoreConfig(
        judge=str(model), featuriser=str(model), bertscore_model=str(model), mauve_min_samples=20,
        mauve_seeds=(25, 26), bertscore_idf=True, **config,
    )  # fmt: skip
    return score(manifest, found, settings, output, cache=cache)


def test_mauve_has_a_floor_a_ceiling_and_an_error(scored: Path) -> None:
    results = load_results(scored)
    rows = {system["name"]: system["metrics"]["mauve"] for system in results["systems"]}
    assert rows["human"]["value"] == pytest.approx(100) and rows["human"]["spread"] is None
    facts = results["parameters"]["mauve"]
    assert rows["nothing"]["value"] < 60 and facts["floor"] == pytest.approx(0.3968, abs=1e-3)
    # The row of other documents is human text that is not among the samples: what the ceiling is.
    assert rows["other"]["value"] == pytest.approx(facts["ceiling"])
    seeds, texts = rows["AR"]["seed_sd"], rows["AR"]["sampling_sd"]
    assert rows["AR"]["spread"] == pytest.approx((seeds**2 / 2 + texts**2) ** 0.5) and texts > 0
    assert any(f"floor 0.40, human against other human texts {facts['ceiling']:.1f}" in n for n in results["notes"])


def test_a_second_system_costs_its_own_texts_alone(
    scored: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the human texts nor those of other systems are featurised, matched or judged again."""
    from evaluation.metrics.perplexity import Judge

    featurised: list[Any] = []
    judged: list[Any] = []
    last_token, judge = Encoder.last_token, Judge.score

    def watch_features(self: Encoder, rows: Any) -> Any:
        featurised.extend(rows)
        return last_token(self, rows)

    def watch_judge(self: Judge, pairs: Any) -> Any:
        judged.extend(pairs)
        return judge(self, pairs)

    monkeypatch.setattr(Encoder, "last_token", watch_features)
    monkeypatch.setattr(Judge, "score", watch_judge)
    before = load_results(scored)
    entries = [SystemEntry(system["name"], system["system"]) for system in before["systems"][2:]]
    after = score_again(scored, tiny_lm, [*entries, SystemEntry("cool", f"hf:{tiny_lm}", {"temperature": 0.3})])
    assert 10 < len(featurised) <= 20 and 10 < len(judged) <= 20  # cool texts may be some of the warm ones
    for old, new in zip(before["systems"], after["systems"], strict=False):
        assert {k: v["value"] for k, v in old["metrics"].items() if k not in BUDGETED} == {
            k: v["value"] for k, v in new["metrics"].items() if k not in BUDGETED
        }


BUDGETED = ("entropy", "distinct1", "distinct2", "distinct3", "distinct4")
"""Measured at what the shortest system has, which another system may move."""


def test_compare(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(scored, "human"), (scored, "AR"), (scored, "other")]
    comparison = compare(rows)
    by_key = {(row["system"], row["metric"]): row for row in comparison["differences"]}
    assert by_key["human", "rougeL"]["difference"] > 0 and by_key["human", "rougeL"]["p_holm"] < 0.05
    assert by_key["human", "mauve"]["difference"] > 0 and by_key["AR", "mauve"]["n"] == 20
    assert all(row["p_holm"] >= row["p"] for row in comparison["differences"])
    per_sample = [json.loads(line) for line in (scored / "samples.jsonl").read_text().splitlines()]
    means = {name: sum(r["rouge1"] for r in per_sample if r["system"] == name) / 20 for name in ("AR", "other")}
    assert by_key["AR", "rouge1"]["difference"] == pytest.approx(means["AR"] - means["other"])
    assert "MAUVE" in comparison_table(comparison)
    without = compare(rows, cache=tmp_path / "none")
    assert not any(row["metric"] == "mauve" for row in without["differences"])
    assert "give --cache DIR" in comparison_table(without)
    assert compare([rows[1], rows[1]])["baseline"] == f"{scored}:AR"  # of one name, told apart by their directories
    capsys.readouterr()
    main(["compare", f"{scored}:AR", f"{scored}:other", "--output", str(tmp_path / "c.json")])
    assert "minus other" in capsys.readouterr().out
    assert json.loads((tmp_path / "c.json").read_text())["baseline"] == "other"
    for wrong in ([f"{scored}:AR"], [f"{scored}:nobody", f"{scored}:AR"], [str(scored), f"{scored}:AR"]):
        with pytest.raises(SystemExit):
            main(["compare", *wrong])
    assert re.search(
        "two rows.*\n.*no system 'nobody'; its systems are human.*\n.*write DIR:SYSTEM", capsys.readouterr().err
    )


KILLED = """
    import sys, time
    from pathlib import Path
    import evaluation.scorers as scorers
    from evaluation.metrics.encoder import Encoder
    from tests.evaluation.test_stages import score_features

    scorers._LOT = 2
    original = Encoder.last_token
    def slow(self, rows):
        time.sleep(0.2)
        return original(self, rows)
    Encoder.last_token = slow
    score_features(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[1]))
"""


def score_features(folder: Path, model: str, output: Path) -> dict[str, Any]:
    """BERTScore and MAUVE, of 20 samples and one seed, of what was generated in `folder`."""
    manifest = load_manifest(folder)
    config = ScoreConfig(
        metrics=("bertscore", "mauve"), featuriser=model, bertscore_model=model, mauve_min_samples=20, mauve_seeds=(25,)
    )
    return score(manifest, load_generations(folder, manifest), config, output, cache=output / "cache")


def test_scoring_resumes_after_kill(task_file: Path, tiny_lm: Path, tmp_path: Path) -> None:
    """Killed among the features: what was found is on disk, and the scores are those of a run that was not."""
    pytest.importorskip("mauve", reason="mauve-text is not installed")
    main(["manifest", "--task", str(task_file), "--output", str(tmp_path)])
    main(["generate", "--output", str(tmp_path), "--system", f"AR=hf:{tiny_lm}", "--device", "cpu"])
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(tiny_lm)], cwd=ROOT)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(tmp_path.glob("cache/features/*.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (features,) = tmp_path.glob("cache/features/*.jsonl")
    assert 4 <= len(features.read_text().splitlines()) < 60 and not (tmp_path / "results.json").exists()
    resumed = score_features(tmp_path, str(tiny_lm), tmp_path)
    assert len(features.read_text().splitlines()) == 60  # human, AR and others, each text once
    whole = score_features(tmp_path, str(tiny_lm), tmp_path / "fresh")
    for one, other in zip(resumed["systems"], whole["systems"], strict=True):
        # Up to the rounding of other batches, which k-means may notice.
        assert one["metrics"]["bertscore"]["value"] == pytest.approx(other["metrics"]["bertscore"]["value"], abs=1e-4)
        assert one["metrics"]["mauve"]["value"] == pytest.approx(other["metrics"]["mauve"]["value"], abs=5)


def test_two_tasks_share_a_report_in_the_paper_s_layout(
    task_file: Path, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = []
    for name in ("tinystories", "mine"):
        path = tmp_path / f"{name}.yaml"
        paper = "max_tokens: 1024\nsplit_fraction: [0.4, 0.6]"
        text = task_file.read_text().replace("name: tiny", f"name: {name}")
        path.write_text(text.replace("max_tokens: 20\nsplit_fraction: [0.5, 0.5]", paper))
        tasks += ["--task", str(path)]
    common = ["--metrics", "rouge,diversity", "--system", "other=other", "--reference-tokenizer", str(tiny_lm)]
    common += ["--output", str(tmp_path / "out")]
    main(["run", *tasks, *common, "--limit", "8"])
    assert capsys.readouterr().out.count("8 continuations") == 2
    markdown = (tmp_path / "out" / "table.md").read_text().splitlines()
    head = next(line for line in markdown if line.startswith("| system"))
    assert head.count("tinystories ROUGE") == head.count("mine ROUGE") == 3
    published = next(line for line in markdown if line.startswith("| TextLDM 114M (published)"))
    assert published == "| TextLDM 114M (published) | 36.7 | 7.8 | 20.7 | - | - | - |"
    assert any("Other documents, lengths and scoring models" in line for line in markdown)
    assert "tinystories,,TextLDM 114M,yes,mauve,1.00" in (tmp_path / "out" / "table.csv").read_text()
    # Other lengths than the published ones: no published numbers beside them.
    path.write_text(text.replace("name: mine", "name: tinystories").replace("max_tokens: 20", "max_tokens: 30"))
    main(["run", "--task", str(path), *common[:-1], str(tmp_path / "short"), "--limit", "8"])
    assert "published" not in (tmp_path / "short" / "table.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["run", *tasks, *common, "--source", "one"])
    assert "2 tasks and 1 sources" in capsys.readouterr().err


def test_dry_run_writes_no_text(
    task_file: Path, tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(output, task_file, tiny_lm, "--dry-run")
    plan = capsys.readouterr().out
    rows = {line[:26].strip(): line[26:].split() for line in plan.splitlines()}
    assert rows["AR, continuations"][:2] == ["20", "0"] and rows["AR, unconditional"][:2] == ["3", "0"]
    assert {"rouge", "diversity", "perplexity", "bertscore"} <= rows.keys() and "mauve (refused, n is t" in plan
    assert not list(output.glob("tiny/cache/*/*/*.jsonl")) and not (output / "tiny" / "results.json").exists()
    run(output, task_file, tiny_lm, "--metrics", "rouge")
    capsys.readouterr()
    run(output, task_file, tiny_lm, "--dry-run")
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["AR, continuations"][:3] == ["20", "20", "0.0"]
    run(output, task_file, tiny_lm, "--metrics", "perplexity,bertscore")
    capsys.readouterr()
    run(output, task_file, tiny_lm, "--dry-run")
    rows = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["bertscore"][:3] == ["120", "120", "0.0"]
    assert rows["perplexity"][0] == "120" and int(rows["perplexity"][1]) >= 100  # shuffled ids are not known here
    main(["score", "--output", str(output / "tiny"), "--metrics", "rouge,diversity", "--dry-run"])
    assert "together" in capsys.readouterr().out


def program(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    import os

    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_is_quick_and_errors_are_one_line(tmp_path: Path) -> None:
    done = program("-X", "importtime", "-m", "evaluation", "run", "--help")
    assert done.returncode == 0 and "--judge" in done.stdout
    assert not re.search(r"\b(torch|numpy|transformers|yaml|datasets|huggingface_hub)\b", done.stderr)
    done = program("-m", "evaluation", "manifest", "--task", "none", "--output", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: none: no such task file")


def test_offline_says_which_option_takes_a_local_copy(task_file: Path, tiny_lm: Path, tmp_path: Path) -> None:
    """Everything that would be fetched is named in a line of its own, before anything is written."""
    whole = ["run", "--output", str(tmp_path / "out"), "--system", "other=other"]
    many = tmp_path / "many.yaml"
    documents = tmp_path / "many.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(120)))
    many.write_text(f"name: many\nsource: {documents}\nn: 100\nreference_tokenizer: null\n")
    local = ["--task", str(many), "--judge", str(tiny_lm)]
    cases = [
        ([*whole, "--task", "tinystories", "--metrics", "rouge"], "tokenizer|source"),
        ([*whole, *local], "--featuriser DIR"),
        ([*whole, *local, "--featuriser", str(tiny_lm)], "--bertscore-model DIR"),
        ([*whole, "--task", str(task_file), "--metrics", "perplexity"], "--judge DIR"),
        ([*whole, *local, "--metrics", "rouge", "--system", "x=hf:gpt2"], "hf: gpt2"),
    ]
    script = textwrap.dedent("""
        import contextlib, json, sys
        from evaluation.__main__ import main
        for arguments in json.loads(sys.argv[1]):
            with contextlib.suppress(SystemExit):
                main(arguments)
    """)
    done = program("-c", script, json.dumps([c for c, _ in cases]), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(cases), done.stderr
    assert not list(tmp_path.glob("out/*/cache/*/*/*")) and not list(tmp_path.glob("out/*/generations.json"))
    for line, (_, option) in zip(errors, cases, strict=True):
        assert re.search(option, line) and "HF_HUB_OFFLINE forbids fetching it" in line, line
