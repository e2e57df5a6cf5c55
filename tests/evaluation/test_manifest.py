import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.shard import shard
from evaluation.generation import Generations, load_generations, refuse_other_manifests
from evaluation.manifest import build_manifest, load_manifest, save_manifest
from evaluation.systems import SystemEntry, open_writer
from evaluation.tasks import TASKS, TaskConfig, load_task, open_pool
from megatext.config import ConfigError
from megatext.data import DataError
from tests.evaluation.conftest import make_texts


def test_prefix_and_target_are_the_document(task_file: Path, tmp_path: Path) -> None:
    manifest = build_manifest(load_task(str(task_file)))
    documents = set(make_texts(40))
    for sample in manifest.samples:
        assert any(document.startswith(sample.prefix + sample.target) for document in documents)
        assert len(sample.prefix.split()) == len(sample.target.split()) == 10
    save_manifest(manifest, tmp_path)
    loaded = load_manifest(tmp_path)
    assert (loaded.samples, loaded.hash) == (manifest.samples, manifest.hash)


def test_a_smaller_task_is_a_prefix_and_order_of_the_pool_does_not_matter(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    whole = build_manifest(task)
    assert build_manifest(replace(task, n=7)).samples == whole.samples[:7]
    source = Path(task.source)
    source.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    assert build_manifest(task).hash == whole.hash


def test_split_fraction_stays_in_its_range(task_file: Path) -> None:
    task = replace(load_task(str(task_file)), split_fraction=(0.3, 0.7))
    fractions = [sample.split_fraction for sample in build_manifest(task).samples]
    assert 0.3 <= min(fractions) < 0.45 and 0.55 < max(fractions) <= 0.7


def test_cut_never_breaks_a_character(tmp_path: Path, tiny_lm: Path) -> None:
    """Every character here is several byte tokens, so nearly every split by tokens would fall inside one."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} " + "日本語テキスト" * 20 for i in range(8)))
    task = TaskConfig("bytes", str(text), n=8, min_tokens=20, max_tokens=50, reference_tokenizer=str(tiny_lm))
    for sample in build_manifest(task).samples:
        assert "\ufffd" not in sample.prefix + sample.target
        assert any(document.startswith(sample.prefix + sample.target) for document in text.read_text().split("\n\n"))


def test_too_few_documents_says_how_many(task_file: Path) -> None:
    with pytest.raises(ConfigError, match="only 40 of 40 documents .*--limit 40"):
        build_manifest(replace(load_task(str(task_file)), n=41))


def test_missing_source_and_task_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        build_manifest(TaskConfig("x", str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="shipped tasks: .*tinystories"):
        load_task("tinystorys")


def test_a_split_of_shards_is_a_source(tmp_path: Path, tokenizer_directory: Path) -> None:
    text = tmp_path / "texts.jsonl"
    texts = make_texts(40)
    text.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    shards = tmp_path / "shards"
    shard([str(text)], str(tokenizer_directory), shards, shard_tokens=300, validation_fraction=0.2, test_fraction=0.4)
    read = []
    for split in ("train", "validation", "test"):
        pool = open_pool(f"shards:{shards}:{split}")
        assert pool.lengths is not None and len(pool.ids) == len(pool.lengths)
        documents = [pool.read(index) for index in range(len(pool.ids))]
        assert all(len(ids) + 1 == length for ids, length in zip(documents, pool.lengths, strict=True))
        read += [pool.tokenizer.decode(ids) for ids in documents]
    assert sorted(read) == sorted(texts)
    with pytest.raises(DataError, match="has no split dev"):
        open_pool(f"shards:{shards}:dev")


@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.yaml")))
def test_shipped_tasks_are_valid(name: str) -> None:
    assert load_task(name).name == name


def test_results_of_another_manifest_are_refused(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    first, second = build_manifest(task), build_manifest(replace(task, seed=1))
    texts = [sample.target for sample in first.samples]
    written = Generations(SystemEntry("human", "human"), "f", None, None, first.hash, 0, texts, None, None, None, [])
    with pytest.raises(DataError, match="never compared"):
        refuse_other_manifests([written], second, "here")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(f'{{"id": "1", "text": "x", "manifest": "{first.hash}"}}\n')
    with pytest.raises(DataError, match="generate again"):
        open_writer(SystemEntry("x", f"jsonl:{foreign}"), second, judge_dir=None, device="cpu")
    with pytest.raises(DataError, match="generate --output"):
        load_generations(tmp_path, first)
