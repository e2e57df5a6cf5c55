"""Tasks and manifests: what is chosen and cut depends on the documents alone, and a changed manifest is refused."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.shard import shard
from evaluation.manifest import build_manifest, load_manifest, save_manifest, stored_manifest
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
        assert (sample.split, sample.end) == (len(sample.prefix), len(sample.prefix + sample.target))
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest


def test_a_smaller_task_is_a_prefix_and_order_of_the_pool_does_not_matter(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    whole = build_manifest(task)
    assert build_manifest(replace(task, n=7)).samples == whole.samples[:7]
    source = Path(task.source)
    source.write_text("".join(reversed(source.read_text().splitlines(keepends=True))))
    assert build_manifest(task).hash == whole.hash
    # A document more moves at most one sample, and the hash with it.
    source.write_text(source.read_text() + json.dumps({"text": make_texts(1, seed=9)[0]}) + "\n")
    more = build_manifest(task)
    assert len(set(whole.samples) - set(more.samples)) <= 1 and (more.hash != whole.hash) == (more != whole)


def test_others_are_the_documents_that_rank_next(task_file: Path) -> None:
    task = load_task(str(task_file))
    manifest = build_manifest(task)
    ids = [sample.id for sample in manifest.samples + manifest.others]
    assert len(manifest.others) == 20 and len(set(ids)) == 40
    small = build_manifest(replace(task, n=5))
    assert small.others == manifest.samples[5:10]
    assert build_manifest(replace(task, n=21)).others == ()  # 40 documents are too few


def test_the_hash_covers_everything(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    manifest = build_manifest(task)
    changes = [{"seed": 1}, {"max_tokens": 21}, {"min_tokens": 19}, {"name": "other"}, {"split_fraction": (0.5, 0.51)}]
    hashes = {build_manifest(replace(task, **change)).hash for change in changes}  # type: ignore[arg-type]
    assert len(hashes | {manifest.hash}) == 6
    for name, old, new in [
        ("manifest.jsonl", "cat", "dog"),
        ("others.jsonl", "cat", "dog"),
        ("manifest.json", '"seed": 0', '"seed": 2'),
    ]:
        save_manifest(manifest, tmp_path)
        path = tmp_path / name
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(DataError, match="changed by hand"):
            load_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="manifest --output"):
        load_manifest(tmp_path)


def test_an_unchanged_source_is_not_read_again(
    task_file: Path, tiny_lm: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    task = load_task(str(task_file))
    assert stored_manifest(task, tmp_path / "none") is None
    manifest = build_manifest(task)
    save_manifest(manifest, tmp_path)
    assert stored_manifest(task, tmp_path) == manifest
    assert stored_manifest(replace(task, seed=1), tmp_path) is None
    Path(task.source).write_text(Path(task.source).read_text() + '{"text": "more"}\n')
    assert stored_manifest(task, tmp_path) is None
    by_tokens = replace(task, reference_tokenizer=str(tiny_lm), min_tokens=8)
    save_manifest(build_manifest(by_tokens), tmp_path)
    assert stored_manifest(by_tokens, tmp_path) is not None
    facts = json.loads((tmp_path / "manifest.json").read_text())
    other = build_manifest(replace(by_tokens, reference_tokenizer=str(tokenizer_directory)))
    assert facts["reference_fingerprint"] != other.task["reference_fingerprint"]
    save_manifest(replace(other, task={**other.task, "reference_tokenizer": str(tiny_lm)}), tmp_path)
    assert stored_manifest(by_tokens, tmp_path) is None  # the tokenizer at that path is another one now


def test_split_fraction_stays_in_its_range(task_file: Path) -> None:
    task = replace(load_task(str(task_file)), split_fraction=(0.3, 0.7))
    fractions = [sample.split_fraction for sample in build_manifest(task).samples]
    assert 0.3 <= min(fractions) < 0.45 and 0.55 < max(fractions) <= 0.7


@given(st.lists(st.text("ab é日🧙\n", min_size=1, max_size=60), min_size=1, max_size=5))
def test_cut_never_breaks_a_character(tiny_lm: Path, texts: list[str]) -> None:
    """Nearly every character is several byte tokens, so nearly every split by tokens would fall inside one."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text + "."}) + "\n" for text in texts))
        task = TaskConfig("bytes", str(path), n=1, min_tokens=4, max_tokens=12, reference_tokenizer=str(tiny_lm))
        try:
            manifest = build_manifest(task)
        except ConfigError:
            return  # all too short
    for sample in manifest.samples:
        document = sample.prefix + sample.target
        assert any((text + ".").strip().startswith(document) for text in texts) and "\ufffd" not in document
        assert sample.prefix.strip() and sample.target.strip() and sample.n_ref_tokens <= 12


def test_a_long_document_is_cut_as_if_it_ended_there(tmp_path: Path, tiny_lm: Path) -> None:
    """Only the beginning of a book is tokenized: the cut must not notice."""
    long = " ".join(make_texts(40))
    path = tmp_path / "long.txt"
    path.write_text(long)
    task = TaskConfig(
        "long", str(path), n=1, max_tokens=30, split_fraction=(0.5, 0.5), reference_tokenizer=str(tiny_lm)
    )
    (sample,) = build_manifest(task).samples
    path.write_text(long[:1000])
    assert (build_manifest(task).samples[0].target, 30) == (sample.target, sample.n_ref_tokens)


def test_too_few_documents_says_how_many(task_file: Path) -> None:
    with pytest.raises(ConfigError, match="only 40 of 40 documents .*--limit 40"):
        build_manifest(replace(load_task(str(task_file)), n=41))


def test_missing_source_and_task_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        build_manifest(TaskConfig("x", str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="shipped tasks: .*tinystories"):
        load_task("tinystorys")
    with pytest.raises(ConfigError, match="the name becomes a folder"):
        TaskConfig("a/b", "x")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a b c d e f g h"}\n{"text": \n')
    with pytest.raises(DataError, match="broken.jsonl, line 2: not JSON .*mend"):
        open_pool(TaskConfig("x", str(broken)))


def test_one_set_of_documents_in_every_form_is_one_manifest(tmp_path: Path) -> None:
    """A hub data set with ids, a copy of it on disk, and a folder of its parquet files; texts without ids as JSON
    lines, packed or not, as lines, and between separators."""
    datasets = pytest.importorskip("datasets")
    texts = make_texts(20, words=12)
    data = datasets.Dataset.from_dict({"id": [f"page {i}" for i in range(20)], "text": texts})
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    (tmp_path / "snapshot").mkdir()
    data.to_parquet(tmp_path / "snapshot" / "train-00000.parquet")
    data.to_json(tmp_path / "export.jsonl")
    sources = [f"hf:{tmp_path}/saved:train", f"hf:{tmp_path}/snapshot:train", str(tmp_path / "snapshot")]
    sources.append(str(tmp_path / "export.jsonl"))
    task = TaskConfig("forms", "", n=8, reference_tokenizer=None)
    with_ids = [build_manifest(replace(task, source=source)) for source in sources]
    assert len({manifest.hash for manifest in with_ids}) == 1 and with_ids[0].samples[0].id.startswith("page")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.tokens").write_text("\n".join(texts))
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "news.en-00000-of-00002").write_text("\n".join(texts[:9]))
    (tmp_path / "heldout" / "news.en-00001-of-00002").write_text("\n".join(texts[9:]))
    bare = datasets.Dataset.from_dict({"text": [f" {text}\n" for text in texts]})
    datasets.DatasetDict({"train": bare}).save_to_disk(tmp_path / "bare")
    (tmp_path / "blank.txt").write_text("\n\n".join(texts))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    units = {"a.tokens": "line", "heldout": "line", "blank.txt": "blank_line"}
    without = [
        build_manifest(replace(task, source=str(tmp_path / name), text_unit=units.get(name, "separator")))  # type: ignore[arg-type]
        for name in ("a.jsonl", "a.jsonl.gz", "a.tokens", "heldout", "blank.txt", "a.txt")
    ]
    without.append(build_manifest(replace(task, source=f"hf:{tmp_path}/bare:train")))
    assert len({manifest.hash for manifest in without}) == 1 and without[0].hash != with_ids[0].hash


def test_a_folder_tells_its_kind_or_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="no readable file in this folder"):
        open_pool(TaskConfig("x", str(tmp_path)))
    (tmp_path / "news.en").write_text("one\ntwo\n")
    (tmp_path / "README.txt").write_text("what this is")
    with pytest.raises(DataError, match="several kinds"):
        open_pool(TaskConfig("x", str(tmp_path), text_unit="line"))
    twins = tmp_path / "twins.jsonl"
    twins.write_text('{"id": 0, "text": "a"}\n{"id": 0, "text": "b"}\n')
    with pytest.raises(DataError, match="two documents have the id 0"):
        open_pool(TaskConfig("x", str(twins)))


def test_a_split_of_shards_is_a_source(tmp_path: Path, tokenizer_directory: Path) -> None:
    text = tmp_path / "texts.jsonl"
    texts = make_texts(40)
    text.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    shards = tmp_path / "shards"
    shard([str(text)], str(tokenizer_directory), shards, shard_tokens=300, validation_fraction=0.2, test_fraction=0.4)
    read = []
    for split in ("train", "validation", "test"):
        pool = open_pool(TaskConfig("x", f"shards:{shards}:{split}"))
        read += pool.read(range(len(pool.ids)))
    assert sorted(read) == sorted(texts)
    task = TaskConfig("x", f"shards:{shards}:train", n=3, reference_tokenizer=None)
    own = replace(task, reference_tokenizer=str(tokenizer_directory))
    assert build_manifest(task).hash == build_manifest(own).hash  # null is the shards' own
    with pytest.raises(DataError, match="has no split dev"):
        open_pool(TaskConfig("x", f"shards:{shards}:dev"))


@pytest.mark.parametrize("name", sorted(path.stem for path in TASKS.glob("*.yaml")))
def test_shipped_tasks_follow_the_paper(name: str) -> None:
    task = load_task(name)
    assert (task.name, task.n, task.max_tokens, task.split_fraction) == (name, 1000, 1024, (0.4, 0.6))
    assert task.source.startswith("hf:") and "Qwen3" in str(task.reference_tokenizer)


@pytest.mark.parametrize(
    ("name", "source", "documents"),
    [
        ("tinystories", "tinystories/stories_3000.jsonl.gz", 3000),
        ("lm1b", "lm1b/1b_benchmark.dev.tokens", 12000),
        ("wikipedia", "wikipedia", 4000),
        ("wikisource", "wikisource_like", 19),
    ],
)
def test_shipped_tasks_on_real_text(shared_data: Path, name: str, source: str, documents: int) -> None:
    qwen3 = str(shared_data / "tokenizers" / "qwen3")
    manifest = build_manifest(load_task(name, source=str(shared_data / source), tokenizer=qwen3, limit=16))
    assert len(manifest.samples) == 16 and manifest.task["documents"] >= documents
    for sample in manifest.samples:
        assert 8 <= sample.n_ref_tokens <= 1024 and 0.4 <= sample.split_fraction < 0.6
        share = 1 - sample.n_ref_target_tokens / sample.n_ref_tokens
        assert abs(share - sample.split_fraction) <= 0.5 / sample.n_ref_tokens + 1e-6
