"""launch/generate.py as it is typed: continuations, gaps, traces, and what does not go together."""

import ast
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatext.generation import SamplingConfig, TextGenerator
from tests.generation.test_text_generator import export

PROGRAM = Path(__file__).parents[2] / "launch" / "generate.py"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *options])
    runpy.run_path(str(PROGRAM), run_name="__main__")


@pytest.fixture
def model(tmp_path: Path, tokenizer_directory: Path) -> str:
    return str(export(tmp_path, tokenizer_directory, "one_shot"))


def test_gaps_are_filled(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", model, "--infill", "the cat {3} on the mat", "--steps", "2", "--seed", "4")
    run(monkeypatch, *options, "--samples", "2")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("the cat") and first.endswith("on the mat") and second.endswith("on the mat")
    run(monkeypatch, *options[:-1], "5")
    assert capsys.readouterr().out.splitlines() == [second]


def test_traces_end_in_the_text(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", model, "--prompt", "the cat", "--steps", "3", "--max_tokens", "4", "--length", "oracle")
    run(monkeypatch, *options)
    written = capsys.readouterr().out
    run(monkeypatch, *options, "--trace")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines] == [f"step {step:3d} | " for step in (1, 2, 3)]
    assert written == "the cat" + ast.literal_eval(lines[-1][11:]) + "\n"


def test_what_does_not_go_together(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", model, "--infill", "a {2}", "--prompt", "b")
    assert "neither --prompt nor --trace" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", model, "--infill", "no gap")
    assert "without a gap" in capsys.readouterr().err


def test_options_change_what_they_say_of_the_models_own_sampling(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = SamplingConfig(steps=3, guidance_scale=4.0, guidance_interval=(0.1, 0.9))
    model = export(tmp_path, tokenizer_directory, "one_shot", sampling=own)
    generator = TextGenerator.from_pretrained(model)
    for options, sampling in (
        ((), own),
        (("--steps", "5"), replace(own, steps=5)),
        (("--guidance_interval", "0", "1", "--guidance_scale", "2"), SamplingConfig(steps=3, guidance_scale=2.0)),
    ):
        run(monkeypatch, "--model", str(model), "--prompt", "the cat", "--max_tokens", "9", *options)
        (expected,) = generator.generate(["the cat"], target_tokens=[9], seeds=[0], sampling=sampling)
        assert capsys.readouterr().out == f"the cat{expected}\n"
