"""Systems and the generate stage: what is written, that it depends on its inputs alone, and what a kill leaves."""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.files import append_jsonl, atomic_write, read_log
from evaluation.generation import Generated, Settings, generate, load_generations, refuse_other_manifests
from evaluation.manifest import Manifest, build_manifest, save_manifest
from evaluation.systems import SystemEntry, complete, load_systems, open_system
from evaluation.systems.base import Item, Length, System, Written
from evaluation.systems.causal_lm import CausalLM, CausalSampling
from evaluation.systems.sanity import SanityRow
from evaluation.tasks import load_task
from megatext.config import ConfigError
from megatext.data import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def manifest(task_file: Path) -> Manifest:
    return build_manifest(load_task(str(task_file)))


@pytest.fixture
def settings(tiny_lm: Path, tmp_path: Path) -> Settings:
    return Settings(judge=tiny_lm, cache=tmp_path / "cache")


def test_sanity_rows(manifest: Manifest, tiny_lm: Path, settings: Settings) -> None:
    from megatext.tokenizer import load_tokenizer

    def texts(row: str) -> list[str]:
        return generate(manifest, SystemEntry(row, row), settings).texts

    targets = [sample.target for sample in manifest.samples]
    assert texts("human") == targets and set(texts("empty")) == {""}
    assert texts("other") == [other.target for other in manifest.others] and not set(texts("other")) & set(targets)
    few = replace(manifest, others=())
    assert generate(few, SystemEntry("other", "other"), settings).texts == [*targets[1:], targets[0]]
    for sample, text in zip(manifest.samples, texts("repeat"), strict=True):
        assert text[: len(sample.prefix) + 1] == (" " + sample.prefix)[: len(text)] and len(text) == len(sample.target)
    shuffled = generate(manifest, SystemEntry("shuffled", "shuffled"), settings)
    encode = load_tokenizer(tiny_lm).encode
    assert shuffled.ids is not None
    assert [sorted(ids) for ids in shuffled.ids] == [sorted(encode(target)) for target in targets]
    assert shuffled.ids != [encode(target) for target in targets]


def item(number: int, tokens: int, prefix: str = "the cat ", policy: str = "fixed") -> Item:
    return Item(str(number), prefix, "", Length(policy, tokens))  # type: ignore[arg-type]


def test_a_text_does_not_depend_on_its_batch(tiny_lm: Path) -> None:
    system = CausalLM(tiny_lm, CausalSampling(temperature=0.8, top_p=0.95, top_k=50))
    items = [item(i, 5 + i, "the cat " * i) for i in range(4)] + [item(9, 100, "dog " * 300)]
    together = system.generate(items, 0)
    assert together == [written for one in items for written in system.generate([one], 0)]
    assert together != system.generate(items, 1)
    greedy = CausalLM(tiny_lm, CausalSampling(temperature=0))
    assert greedy.generate(items, 0)[1:2] == greedy.generate([items[1]], 1)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guided_texts_are_the_library_s(tiny_lm: Path, scale: float) -> None:
    """Greedy, against transformers' own guidance, and beside rows of other lengths."""
    import torch

    system = CausalLM(tiny_lm, CausalSampling(temperature=0, guidance_scale=scale))
    items = [item(i, 24, "the cat " * (1 + i) + "dog") for i in range(3)]
    never = [i for i in range(system.model.config.vocab_size) if bool(system._barred(False)[i])]
    expected = []
    for one in items:
        ids = torch.tensor([[*system.start, *system.tokenizer.encode(one.prefix)]])
        settings = {"guidance_scale": scale, "do_sample": False, "max_new_tokens": 24, "suppress_tokens": never}
        null = torch.tensor([[*system.start, int(ids[0, -1])]])
        whole = system.model.generate(ids, negative_prompt_ids=null, **settings)
        expected.append(system._decode(ids[0].tolist(), whole[0, ids.shape[1] :].tolist()))
    assert [written.text for written in system.generate(items, 0)] == expected
    plain = CausalLM(tiny_lm, CausalSampling(temperature=0)).generate(items, 0)
    assert [written.text for written in plain] != expected


def test_guidance_in_laps_of_free_length_and_without_a_prefix(tiny_lm: Path) -> None:
    """The model reads 128 tokens. What guidance compares with is no longer than the prompt, and rows are their own."""
    system = CausalLM(tiny_lm, CausalSampling(temperature=0.9, guidance_scale=2.0))
    items = [item(0, 5), item(1, 100, "dog " * 300), item(2, 8, "cat")]
    for some in (items, [item(i, 30, "the cat " * i + "a", "free") for i in range(4)]):
        together = system.generate(some, 0)
        assert together == [written for one in some for written in system.generate([one], 0)]
    plain = CausalLM(tiny_lm, CausalSampling(temperature=0.9))
    nothing = item(0, 12, "")
    assert system.generate([nothing], 0) == plain.generate([nothing], 0)
    assert system.generate([items[0]], 0) != plain.generate([items[0]], 0)
    with pytest.raises(ConfigError, match="of a guided causal LM"):
        system.log_likelihood([item(0, 5)], 0)


def test_a_table_of_positions_is_not_overrun_by_short_rows(tiny_lm: Path, tmp_path: Path) -> None:
    """GPT-2 has 64 places: a row that has its 4 tokens goes on beside one that needs 50, and must not need a 65th."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(tiny_lm, tmp_path / "gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    system = CausalLM(tmp_path / "gpt2", CausalSampling(temperature=0.9))
    items = [item(0, 4, "dog " * 100), item(1, 50, "cat")]
    together = system.generate(items, 0)
    assert together == [written for one in items for written in system.generate([one], 0)]
    assert together[0].prefix_cut > 0 and together[1].prefix_cut == 0


def test_contexts_longer_than_the_model_reads_are_cut_and_counted(tiny_lm: Path) -> None:
    """The model reads 128 tokens: half of them stay context, so 100 tokens behind 300 take two laps."""
    system = CausalLM(tiny_lm, CausalSampling(temperature=0))
    prefix = "dog " * 300
    ids = system.tokenizer.encode(prefix)
    (short,) = system.generate([item(0, 8, prefix)], 0)
    assert short.prefix_cut == len(ids) - 120
    (alone,) = system.generate([item(0, 8, system.tokenizer.decode(ids[-120:]))], 0)
    assert alone.text == short.text and alone.prefix_cut == 0
    (long,) = system.generate([item(0, 100, prefix)], 0)
    first, second = system._fit(ids, 100), system._fit(ids + [1] * 64, 36)
    assert (len(first[0]), first[1]) == (64, 64) and (len(second[0]), second[1]) == (92, 36)
    assert long.prefix_cut == len(ids) - 64 and len(system.tokenizer.encode(long.text)) > 64


def test_greedy_text_of_a_trained_model(shared_data: Path) -> None:
    """The text that its makers publish, of 200 greedy steps."""
    folder = shared_data / "tiny_lm"
    expected = json.loads((folder / "expected_published.json").read_text())["greedy_200_steps_from_bos"]
    system = CausalLM(folder / "stories260K_hf", CausalSampling(temperature=0))
    prefix = "Once upon a time"
    (written,) = system.generate([item(0, 190, prefix)], 0)
    assert len(expected) > 400 and (prefix + written.text).startswith(expected[:400])


def test_length_rules(tiny_lm: Path) -> None:
    system = CausalLM(tiny_lm, CausalSampling())
    target = " the dog saw"
    (oracle,) = system.generate([Item("0", "the cat", target, Length())], 0)
    (fixed,) = system.generate([item(0, len(system.tokenizer.encode(target)), "the cat")], 0)
    assert oracle == fixed
    # Freed, a model that wants to end does: here every other token is barred from rising above the end of text.
    system.model.lm_head.weight.data[:] = 0
    system.model.lm_head.weight.data[system.tokenizer.eos_id] = system.model.lm_head.weight.data[1] + 1
    free = system.generate([item(i, 30, "the cat", "free") for i in range(8)], 0)
    assert min(len(system.tokenizer.encode(w.text)) for w in free) < 30
    assert Length.parse("free:20") == Length("free", 20) and Length.parse("oracle") == Length()
    for wrong in ("fixed", "oracle:3", "free:x", "longest", "fixed:0"):
        with pytest.raises(ConfigError, match="oracle, fixed:TOKENS or free:TOKENS|at least one"):
            Length.parse(wrong)


def test_cache_is_keyed_by_content(
    manifest: Manifest, tiny_lm: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(**sampling: float) -> SystemEntry:
        return SystemEntry("ar", f"hf:{tiny_lm}", sampling, unconditional=2, unconditional_tokens=6)

    first = generate(manifest, entry(), settings)
    assert len(first.unconditional) == 2 and all(first.unconditional) and first.seconds_per_sample is not None
    assert generate(manifest, entry(temperature=0.5), settings).texts != first.texts
    assert generate(manifest, entry(), replace(settings, seed=1)).texts != first.texts
    assert generate(manifest, entry(), replace(settings, length=Length("fixed", 3))).texts != first.texts
    other_weights = tmp_path / "other"
    shutil.copytree(tiny_lm, other_weights)
    weights = bytearray((other_weights / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other_weights / "model.safetensors").write_bytes(weights)
    asked: list[str] = []
    original = CausalLM.generate

    def watched(self: CausalLM, items: Sequence[Item], seed: int) -> list[Written]:
        asked.extend(one.id for one in items)
        return original(self, items, seed)

    monkeypatch.setattr(CausalLM, "generate", watched)
    assert generate(manifest, entry(), settings) == first and asked == []
    generate(manifest, SystemEntry("ar", f"hf:{other_weights}"), settings)
    assert len(set(asked)) == 20
    asked.clear()
    # More samples of a task do not cost the first ones again.
    few = replace(manifest, samples=manifest.samples[:5])
    generate(few, entry(temperature=0.7), settings)
    asked.clear()
    generate(manifest, entry(temperature=0.7), settings)
    assert set(asked) - {"0", "1"} <= {s.id for s in manifest.samples[5:]}


KILLED = """
    import sys, time
    from pathlib import Path
    from evaluation.generation import Settings, generate
    from evaluation.manifest import load_manifest
    from evaluation.systems import SystemEntry
    from evaluation.systems.sanity import SanityRow

    original = SanityRow.generate
    def slow(self, items, seed):
        time.sleep(0.1)
        return original(self, items, seed)
    SanityRow.generate = slow
    folder = Path(sys.argv[1])
    generate(load_manifest(folder), SystemEntry("again", "repeat", batch_size=2), Settings(cache=folder / "cache"))
"""


def test_resumes_after_kill(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_manifest(manifest, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(tmp_path.glob("cache/generations/*/*.jsonl"))
        if logs and len(logs[0].read_text().splitlines()) >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (log,) = tmp_path.glob("cache/generations/*/*.jsonl")
    with open(log, "a") as file:
        file.write('{"key": "half a li')  # what a kill inside a write leaves
    before = [record["value"]["id"] for record in read_log(log)]
    assert 4 <= len(before) < 20
    entry = SystemEntry("again", "repeat", batch_size=2)
    fresh = generate(manifest, entry, Settings(cache=tmp_path / "fresh"))
    asked: list[str] = []
    original = SanityRow.generate

    def watched(self: SanityRow, items: Sequence[Item], seed: int) -> list[Written]:
        asked.extend(one.id for one in items)
        return original(self, items, seed)

    monkeypatch.setattr(SanityRow, "generate", watched)
    assert generate(manifest, entry, Settings(cache=tmp_path / "cache")).texts == fresh.texts
    assert sorted(before + asked) == sorted(sample.id for sample in manifest.samples)


def test_model_writes_through_the_text_generator(
    manifest: Manifest, tiny_lm: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    @dataclass(frozen=True)
    class SamplingConfig:
        steps: int = 8
        temperature: float = 1.0
        length: str = "oracle"

    class TextGenerator:
        @classmethod
        def from_pretrained(cls, directory: Path, device: str, dtype: Any) -> "TextGenerator":
            from megatext.tokenizer import load_tokenizer

            generator = cls()
            generator.tokenizer = load_tokenizer(directory)  # type: ignore[attr-defined]
            return generator

        def generate(
            self, prompts: list[str], *, target_tokens: list[int], seeds: list[int], sampling: SamplingConfig
        ) -> list[str]:
            calls.append({"target_tokens": target_tokens, "sampling": sampling})
            return [f" text {seed}" for seed in seeds]

    sampling, generator = types.ModuleType("sampling"), types.ModuleType("text_generator")
    sampling.SamplingConfig, generator.TextGenerator = SamplingConfig, TextGenerator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatext.recipes.sampling", sampling)
    monkeypatch.setitem(sys.modules, "megatext.generation.text_generator", generator)
    model = tmp_path / "model"
    shutil.copytree(tiny_lm, model)
    (model / "config.json").write_text('{"kind": "text_dit", "warm_start_hash": "abc"}')
    result = generate(manifest, SystemEntry("dit", f"model:{model}", {"steps": 4}), settings)
    assert result.started_from == "abc"
    assert len(set(result.texts)) == 20 and calls[-1]["sampling"] == SamplingConfig(4)
    assert all(count > 5 for count in calls[-1]["target_tokens"])
    free = replace(settings, length=Length("free", 7))
    generate(manifest, SystemEntry("dit", f"model:{model}", {"steps": 4}), free)
    assert calls[-1] == {"target_tokens": [7] * 20, "sampling": SamplingConfig(4, length="eos")}
    # what a row says is whole; what its model says counts where the row says nothing
    described = {"kind": "text_dit", "config": {"sampling": {"steps": 6}}}
    (model / "config.json").write_text(json.dumps(described))
    for row, expected in (({}, SamplingConfig(6)), ({"temperature": 0.5}, SamplingConfig(8, 0.5))):
        written = generate(manifest, SystemEntry("dit", f"model:{model}", row), settings)
        assert calls[-1]["sampling"] == expected
        assert written.sampled_by == {"steps": expected.steps, "temperature": expected.temperature}
    with pytest.raises(ConfigError, match="system dit, sampling: .*did you mean 'steps'"):
        generate(manifest, SystemEntry("dit", f"model:{model}", {"stepz": 4}), settings)
    with pytest.raises(ConfigError, match="one rule for all systems"):
        generate(manifest, SystemEntry("dit", f"model:{model}", {"length": "eos"}), settings)


def test_a_text_vae_reconstructs_the_target(manifest: Manifest, settings: Settings, tmp_path: Path) -> None:
    """An untrained one writes anything, but the same text for the same target, whatever the prefix."""
    import torch

    from megatext.nn.blocks import TrunkConfig
    from megatext.nn.text_vae import TextVAE, TextVAEConfig
    from megatext.recipes.pretrained import write_model
    from megatext.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(settings.judge or "")
    torch.manual_seed(0)
    config = TextVAEConfig(
        latent_channels=8, encoder=TrunkConfig(layers=0, width=16), decoder=TrunkConfig(layers=1, width=16, heads=2)
    )
    vae = TextVAE(config, tokenizer.vocab_size)
    write_model(tmp_path / "vae", "text_vae", config, vae.state_dict(), tokenizer=Path(str(settings.judge)))
    entry = SystemEntry("vae", f"model:{tmp_path / 'vae'}")
    found = generate(manifest, entry, settings)
    ids = torch.tensor([tokenizer.encode(manifest.samples[3].target)])
    from megatext.nn.layout import Layout

    layout = Layout.of(torch.zeros_like(ids), torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        vae.eval()
        wanted = vae.decode(vae.encode(ids, layout)[0], layout)[0].argmax(-1).tolist()
    assert found.texts[3] == tokenizer.decode(wanted) and found.weights is not None
    with pytest.raises(ConfigError, match="is not sampled"):
        generate(manifest, replace(entry, sampling={"steps": 1}), settings)


class Upper(System):
    """A system of a user's own, as a systems file names it."""

    def __init__(self, mark: str = "") -> None:
        self.mark = mark

    def fingerprint(self) -> str:
        return f"upper {self.mark}"

    def generate(self, items: Sequence[Item], seed: int) -> list[Written]:
        return [Written(one.prefix.upper() + self.mark) for one in items]


def test_a_system_of_ones_own(manifest: Manifest, settings: Settings) -> None:
    entry = SystemEntry("upper", "python:tests.evaluation.test_generation:Upper", {"mark": "!"})
    assert generate(manifest, entry, settings).texts == [s.prefix.upper() + "!" for s in manifest.samples]
    for wrong in ("python:tests.evaluation.test_generation:Lower", "python:no.such.module:x"):
        with pytest.raises(ConfigError, match="python:MODULE:FUNCTION"):
            open_system(SystemEntry("x", wrong), manifest)
    with pytest.raises(ConfigError, match="returned dict, not an evaluation System"):
        open_system(SystemEntry("x", "python:builtins:dict"), manifest)


def test_bad_systems_say_what_to_do(manifest: Manifest, tmp_path: Path) -> None:
    def opened(system: str, **sampling: float) -> Any:
        return open_system(SystemEntry("x", system, sampling), manifest)

    with pytest.raises(ConfigError, match="model:DIR, hf:DIR"):
        opened("gpt5")
    with pytest.raises(ConfigError, match="no such model directory"):
        opened(f"hf:{tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="no config.json"):
        opened(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        opened(f"hf:{tmp_path}", temprature=1.0)
    for wrong in ({"top_p": 2.0}, {"guidance_scale": -1.0}):
        with pytest.raises(ConfigError, match="top_p <= 1, top_k >= 0 and guidance_scale >= 0"):
            opened(f"hf:{tmp_path}", **wrong)
    (tmp_path / "config.json").write_text('{"kind": "text_gan"}')
    with pytest.raises(ConfigError, match="recipe this version cannot write with"):
        opened(f"model:{tmp_path}")
    with pytest.raises(ConfigError, match="give --judge"):
        opened("shuffled")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"id": manifest.samples[0].id, "text": "a"}) + "\n")
    with pytest.raises(DataError, match="lacks 19 of 20 samples"):
        opened(f"jsonl:{texts}")
    texts.write_text(2 * texts.read_text())
    with pytest.raises(DataError, match="stands there twice"):
        opened(f"jsonl:{texts}")
    for twins in ([SystemEntry("a", "human"), SystemEntry("a", "other")], [SystemEntry("human", "jsonl:x")]):
        with pytest.raises(ConfigError, match="two rows have this name"):
            complete(twins, None)
    with pytest.raises(ConfigError, match="batch_size >= 1"):
        SystemEntry("x", "hf:x", batch_size=0)
    with pytest.raises(ConfigError, match="writes no passages"):
        SystemEntry("x", "jsonl:x", unconditional=3)
    systems = tmp_path / "systems.yaml"
    systems.write_text("- {name: mine, system: empty")
    with pytest.raises(ConfigError, match="systems.yaml: not YAML"):
        load_systems(systems)
    systems.write_text("- {name: mine, system: empty}\n")
    entries = load_systems(systems)
    assert [entry.name for entry in complete(entries, tmp_path)] == ["human", "shuffled", "mine"]
    assert [entry.name for entry in complete(entries, None)] == ["human", "mine"]


def test_generations_of_another_manifest_are_refused(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    first, second = build_manifest(task), build_manifest(replace(task, seed=1))
    written = generate(first, SystemEntry("human", "human"), Settings(cache=tmp_path / "cache"))
    assert isinstance(written, Generated)
    with pytest.raises(DataError, match="never compared"):
        refuse_other_manifests([written], second, "here")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(f'{{"id": "1", "text": "x", "manifest": "{first.hash}"}}\n')
    with pytest.raises(DataError, match="generate again"):
        open_system(SystemEntry("x", f"jsonl:{foreign}"), second)
    with pytest.raises(DataError, match="generate --output"):
        load_generations(tmp_path, first)
    (tmp_path / "generations.json").write_text('[{"entry": {"name": "x", "system": "human"}, "length": {}}]')
    with pytest.raises(DataError, match="not of this version"):
        load_generations(tmp_path, first)


def test_half_a_surrogate_pair_from_elsewhere_is_mended(manifest: Manifest, settings: Settings, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"id": s.id, "text": "a \ud83d b"}) + "\n" for s in manifest.samples))
    assert set(generate(manifest, SystemEntry("x", f"jsonl:{texts}"), settings).texts) == {"a \ufffd b"}


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
