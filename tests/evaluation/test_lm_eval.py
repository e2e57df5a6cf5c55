"""The adapter for lm-evaluation-harness, with a local task of each kind and the harness's own Hugging Face model."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval: Any = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from megatext.config import ConfigError  # noqa: E402
from tests.evaluation.conftest import make_texts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """generate_until, multiple_choice and rolling likelihood on six made-up lines."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return TaskManager(include_path=str(folder), include_defaults=False)


def write_tasks(folder: Path) -> None:
    lines = [{"q": text[:40], "a": text[40:70], "text": text * 12} for text in make_texts(6, words=25)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/lines.jsonl}}}}\ntest_split: test\n"
    (folder / "write.yaml").write_text(
        common + 'task: local_write\noutput_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n'
    )
    (folder / "choose.yaml").write_text(
        common + 'task: local_choose\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: 0\n'
        'doc_to_choice: ["{{a}}", " a small house"]\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "roll.yaml").write_text(
        common + 'task: local_roll\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}]\n"
    )


def evaluate(model: Any, names: list[str], tasks: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    return found


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]


@pytest.fixture(params=["tiny", "trained"])
def causal_lm(request: pytest.FixtureRequest) -> Path:
    """A model without a begin-of-text, and one with `<s>` before every text."""
    if request.param == "tiny":
        return Path(request.getfixturevalue("tiny_lm"))
    return Path(request.getfixturevalue("shared_data")) / "tiny_lm" / "stories260K_hf"


def test_likelihoods_are_those_of_the_harness(causal_lm: Path, tasks: Any) -> None:
    """Multiple choice and rolling windows, for texts longer than the 128 or 512 tokens the models read."""
    from lm_eval.models.huggingface import HFLM

    from evaluation.lm_eval_model import MegatextLM

    names = ["local_choose", "local_roll"]
    ours = evaluate(MegatextLM(pretrained=str(causal_lm), batch_size=4), names, tasks)
    theirs = evaluate(HFLM(pretrained=str(causal_lm), device="cpu", batch_size=1), names, tasks)
    for name in names:
        found, wanted = answers(ours, name), answers(theirs, name)
        assert len(found) == 6
        for a, b in zip(found, wanted, strict=True):
            assert _numbers(a) == pytest.approx(_numbers(b), rel=1e-4, abs=1e-4)
    assert ours["results"]["local_choose"]["acc,none"] == theirs["results"]["local_choose"]["acc,none"]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def test_greedy_texts_are_those_of_the_harness(tiny_lm: Path, tasks: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    from evaluation.lm_eval_model import MegatextLM

    ours = MegatextLM(pretrained=str(tiny_lm), batch_size=4, temperature=0)
    found = answers(evaluate(ours, ["local_write"], tasks), "local_write")
    theirs = HFLM(pretrained=str(tiny_lm), device="cpu", batch_size=1)
    assert found == answers(evaluate(theirs, ["local_write"], tasks), "local_write")
    assert all("." not in text for ((text,),) in zip(found, strict=True) for text in [text])


def test_greedy_is_told_from_not(tiny_lm: Path) -> None:
    """What the model itself writes greedily is greedy, and with another last token it is not."""
    from evaluation.lm_eval_model import MegatextLM

    model = MegatextLM(pretrained=str(tiny_lm), temperature=0)
    ids = model.tok_encode("the cat saw the dog")
    wanted = model._causal("x")._write([ids], [[]], [5], [0], False)[0]
    other = [*wanted[:-1], (wanted[-1] + 1) % 300]
    found = model._loglikelihood_tokens([(("", ""), ids, wanted), (("", ""), ids, other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_the_command_line_is_lm_eval_s_own(tiny_lm: Path, tmp_path: Path) -> None:
    """With all its models, and a refusal in one line."""
    import os
    import subprocess
    import sys

    def program(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "evaluation.lm_eval_model", "run", "--tasks", "local_write", *arguments]
        command += ["--include_path", str(tmp_path)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment)

    write_tasks(tmp_path)
    wrong = program("--model", "megatext", "--model_args", f"pretrained={tmp_path}")
    assert wrong.returncode == 1 and "no config.json" in wrong.stderr.splitlines()[-1]
    from lm_eval.api.registry import get_model

    import evaluation.lm_eval_model  # noqa: F401

    assert get_model("megatext").__name__ == "MegatextLM" and get_model("hf").__name__ == "HFLM"


def test_settings_and_seeds(tiny_lm: Path) -> None:
    from lm_eval.api.instance import Instance

    from evaluation.lm_eval_model import MegatextLM

    def ask(model: MegatextLM, prompts: list[str]) -> list[str]:
        settings = {"until": ["zzz"], "max_gen_toks": 10}
        requests = [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)]
        return model.generate_until(requests, disable_tqdm=True)

    model = MegatextLM(pretrained=str(tiny_lm))
    twice = ask(model, ["the cat", "the dog", "the cat"])
    assert twice[0] != twice[2] and ask(model, ["the cat"]) == twice[:1]  # asked again: another text
    assert ask(MegatextLM(pretrained=str(tiny_lm), seed=1), ["the cat"]) != twice[:1]
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        MegatextLM(pretrained=str(tiny_lm), temprature=0.5)


def test_a_diffusion_model_writes_and_refuses_likelihoods(
    tiny_lm: Path, tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluation.lm_eval_model as adapter
    from evaluation.systems.base import Item, System, Written

    class Diffusion(System):
        def fingerprint(self) -> str:
            return "diffusion"

        def generate(self, items: Any, seed: int) -> list[Written]:
            return [Written(f" {item.length.tokens} tokens. And more") for item in items if isinstance(item, Item)]

    monkeypatch.setattr(adapter, "open_model", lambda *arguments, **more: Diffusion())
    model = adapter.MegatextLM(pretrained=str(tiny_lm))
    assert answers(evaluate(model, ["local_write"], tasks), "local_write") == [[[" 12 tokens"]]] * 6
    with pytest.raises(ConfigError, match="no log-likelihood of a text; choose tasks with output_type generate_until"):
        evaluate(model, ["local_choose"], tasks)
