import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evaluation.files import append_jsonl, atomic_write, read_log
from evaluation.generation import generate
from evaluation.manifest import Manifest, build_manifest, save_manifest
from evaluation.systems import (
    CausalSampling,
    CausalWriter,
    Request,
    SanityRow,
    SystemEntry,
    Written,
    complete,
    load_systems,
    open_writer,
)
from evaluation.tasks import load_task
from megatext.config import ConfigError
from megatext.data import DataError


@pytest.fixture
def manifest(task_file: Path) -> Manifest:
    return build_manifest(load_task(str(task_file)))


def test_sanity_rows(manifest: Manifest, tiny_lm: Path, tmp_path: Path) -> None:
    from megatext.tokenizer import load_tokenizer

    def texts(row: str) -> list[str]:
        return generate(manifest, SystemEntry(row, row), output=tmp_path, seed=0, judge_dir=tiny_lm).texts

    targets = [sample.target for sample in manifest.samples]
    assert texts("human") == targets and set(texts("empty")) == {""}
    assert sorted(texts("other")) == sorted(targets) and all(
        a != b for a, b in zip(texts("other"), targets, strict=True)
    )
    for sample, text in zip(manifest.samples, texts("repeat"), strict=True):
        assert text[: len(sample.prefix) + 1] == (" " + sample.prefix)[: len(text)] and len(text) == len(sample.target)
    shuffled = generate(manifest, SystemEntry("shuffled", "shuffled"), output=tmp_path, seed=0, judge_dir=tiny_lm)
    encode = load_tokenizer(tiny_lm).encode
    assert shuffled.ids is not None
    assert [sorted(ids) for ids in shuffled.ids] == [sorted(encode(target)) for target in targets]
    assert shuffled.ids != [encode(target) for target in targets]


def test_a_text_does_not_depend_on_its_batch(tiny_lm: Path) -> None:
    writer = CausalWriter(tiny_lm, CausalSampling(temperature=0.8, top_p=0.95, top_k=50), "cpu")
    requests = [Request(str(i), "the cat " * i, 5 + i, seed=i) for i in range(4)]
    together = writer.write(requests)
    assert together == [written for request in requests for written in writer.write([request])]
    assert [len(writer._tokenizer.encode(w.text)) <= r.target_tokens for w, r in zip(together, requests, strict=True)]
    greedy = CausalWriter(tiny_lm, CausalSampling(temperature=0), "cpu")
    assert greedy.write(requests)[1:2] == greedy.write([requests[1]])
    long = greedy.write([Request("x", "the cat " * 300, 8, seed=0)])
    assert long[0].text  # a prefix longer than the model reads is cut at its start


def test_greedy_text_of_a_trained_model(shared_data: Path) -> None:
    writer = CausalWriter(shared_data / "tiny_lm" / "stories260K_hf", CausalSampling(temperature=0), "cpu")
    (written,) = writer.write([Request("0", "Once upon a time", 20, seed=0)])
    assert written.text.startswith(", there was a little girl named Lily")


def test_cache_is_keyed_by_content(
    manifest: Manifest, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(**sampling: float) -> SystemEntry:
        return SystemEntry("ar", f"hf:{tiny_lm}", sampling, unconditional=2, unconditional_tokens=6)

    first = generate(manifest, entry(), output=tmp_path, seed=0)
    assert len(first.unconditional) == 2 and all(first.unconditional) and first.seconds_per_sample is not None
    assert generate(manifest, entry(temperature=0.5), output=tmp_path, seed=0).texts != first.texts
    assert generate(manifest, entry(), output=tmp_path, seed=1).texts != first.texts

    def fail(self: Any, requests: Sequence[Request]) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(CausalWriter, "write", fail)
    assert generate(manifest, entry(), output=tmp_path, seed=0) == first


KILLED = """
    import sys, time
    from pathlib import Path
    import evaluation.systems as systems
    from evaluation.generation import generate
    from evaluation.manifest import load_manifest

    original = systems.SanityRow.write
    def slow(self, requests):
        time.sleep(0.1)
        return original(self, requests)
    systems.SanityRow.write = slow
    entry = systems.SystemEntry("again", "repeat", batch_size=2)
    generate(load_manifest(Path(sys.argv[1])), entry, output=Path(sys.argv[1]), seed=0)
"""


def test_resumes_after_kill(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_manifest(manifest, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=Path(__file__).parents[2]
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(tmp_path.glob("cache/generations/*.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (log,) = tmp_path.glob("cache/generations/*.jsonl")
    with open(log, "a") as file:
        file.write('{"id": "half a li')  # what a kill inside a write leaves
    before = [record["id"] for record in read_log(log)]
    assert 4 <= len(before) < 20
    entry = SystemEntry("again", "repeat", batch_size=2)
    fresh = generate(manifest, entry, output=tmp_path / "fresh", seed=0)
    asked: list[str] = []
    original = SanityRow.write

    def watched(self: SanityRow, requests: Sequence[Request]) -> list[Written]:
        asked.extend(request.id for request in requests)
        return original(self, requests)

    monkeypatch.setattr(SanityRow, "write", watched)
    assert generate(manifest, entry, output=tmp_path, seed=0).texts == fresh.texts
    assert sorted(before + asked) == sorted(sample.id for sample in manifest.samples)


def test_model_writes_through_the_text_generator(
    manifest: Manifest, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    @dataclass(frozen=True)
    class SamplingConfig:
        steps: int = 8

    class TextGenerator:
        @classmethod
        def from_pretrained(cls, directory: Path, device: str) -> "TextGenerator":
            return cls()

        def generate(
            self, prompts: list[str], *, target_tokens: list[int], seeds: list[int], sampling: SamplingConfig
        ) -> list[str]:
            calls.append({"target_tokens": target_tokens, "sampling": sampling})
            return [f" text {seed}" for seed in seeds]

    sampling, generator = types.ModuleType("sampling"), types.ModuleType("text_generator")
    sampling.SamplingConfig, generator.TextGenerator = SamplingConfig, TextGenerator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatext.generation.sampling", sampling)
    monkeypatch.setitem(sys.modules, "megatext.generation.text_generator", generator)
    model = tmp_path / "model"
    shutil.copytree(tiny_lm, model)
    (model / "config.json").write_text('{"kind": "text_dit", "warm_start_hash": "abc"}')
    result = generate(manifest, SystemEntry("dit", f"model:{model}", {"steps": 4}), output=tmp_path, seed=0)
    assert result.started_from == "abc"
    assert len(set(result.texts)) == 20 and calls[-1]["sampling"] == SamplingConfig(4)
    assert all(count > 5 for count in calls[-1]["target_tokens"])
    with pytest.raises(ConfigError, match="system dit, sampling: .*did you mean 'steps'"):
        generate(manifest, SystemEntry("dit", f"model:{model}", {"stepz": 4}), output=tmp_path, seed=0)


def test_bad_systems_say_what_to_do(manifest: Manifest, tmp_path: Path) -> None:
    def opened(system: str, **sampling: float) -> Any:
        return open_writer(SystemEntry("x", system, sampling), manifest, judge_dir=None, device="cpu")

    with pytest.raises(ConfigError, match="model:DIR, hf:DIR"):
        opened("gpt5")
    with pytest.raises(DataError, match="no such model directory"):
        opened(f"hf:{tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        opened(f"hf:{tmp_path}", temprature=1.0)
    with pytest.raises(ConfigError, match="give --judge"):
        opened("shuffled")
    partial = tmp_path / "partial.jsonl"
    partial.write_text(json.dumps({"id": manifest.samples[0].id, "text": "a"}) + "\n")
    with pytest.raises(DataError, match="lacks 19 of 20 samples"):
        opened(f"jsonl:{partial}")
    with pytest.raises(ConfigError, match="stands twice"):
        complete([SystemEntry("a", "human"), SystemEntry("a", "other")])
    systems = tmp_path / "systems.yaml"
    systems.write_text("- {name: mine, system: empty}\n")
    assert [entry.name for entry in load_systems(systems)] == ["human", "shuffled", "mine"]


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fail(source: str, target: str) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    log = tmp_path / "log"
    log.write_text('{"a": 1}\n{"a": 2')
    append_jsonl(log, [{"a": 3}])
    assert [record["a"] for record in read_log(log)] == [1, 3]
