"""Sharding: every input form, splits by content, duplicates, and results that no interruption can change."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_tools import inspect_shards, raw_readers, shard, sources, train_tokenizer
from megatext.data import DataError
from megatext.data.tar_index import TarIndex
from megatext.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the a cat dog house river sees likes under over and then small green old new bird stone sings waits".split()
TEXTS = [" ".join(WORDS[(i * j + j * j) % len(WORDS)] for j in range(5 + i % 40)) + f". {i}\nend" for i in range(240)]


def trained_tokenizer(directory: Path) -> str:
    """Its folder: of 305 pieces of TEXTS."""
    train_tokenizer.train(TEXTS, 305).save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": t, "meta": {"url": f"u{i}"}}).encode() + b"\n" for i, t in enumerate(texts))


def tree(directory: Path) -> dict[str, str]:
    """sha256 of every file that is not an index."""
    files = [p for p in directory.rglob("*") if p.is_file() and p.suffix != ".npz"]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts_of(directory: Path) -> dict[str, str]:
    """Text by key over all splits, read back through the index and the tokenizer."""
    tokenizer = load_tokenizer(directory / "tokenizer")
    found = {}
    for path in directory.glob("*.tar"):
        index = TarIndex(path)
        for i in range(len(index)):
            ids = index.array(i).tolist()
            assert ids[-1] == tokenizer.eos_id
            found[index.key(i)] = tokenizer.decode(ids)
    return found


def test_every_input_form_gives_the_same_documents(tokenizer: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    data = json_lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    frames = zstandard.ZstdCompressor(write_content_size=False)
    half = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "a.jsonl.zst").write_bytes(frames.compress(data[:half]) + frames.compress(data[half:]))
    with tarfile.open(tmp_path / "a.jsonl.zst.tar", "w") as tar:
        for name, part in (("2005-06.jsonl.zst", data[:half]), ("2012-07.jsonl.zst", data[half:])):
            info = tarfile.TarInfo(name)
            content = frames.compress(part)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "url": ["u"] * len(TEXTS)}), tmp_path / "a.parquet")
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "jsonl.zst.tar", "txt", "parquet"):
        output = tmp_path / f"out-{suffix}"
        manifest = shard.shard([str(tmp_path / f"a.{suffix}")], tokenizer, output, test_fraction=0.1)
        assert sorted(texts_of(output).values()) == sorted(TEXTS), suffix
        assert sum(split["documents"] for split in manifest["splits"].values()) == len(TEXTS)
    assert set(texts_of(tmp_path / "out-jsonl.zst.tar")) > {"a-2005-06-000000000", "a-2012-07-000000000"}
    assert sources.expand([str(tmp_path)])[0].endswith("a.jsonl")


def test_splits_filters_and_manifest(tokenizer: str, tmp_path: Path) -> None:
    lines = (
        json_lines([*TEXTS, TEXTS[3], TEXTS[4].upper(), "tiny", " "])
        + b'{"text": 5}\nnot json\n\n{"text": ["one part", "another"]}\n'
        + b'{"text": "\xff"}\n{"text": "un texte d\'ailleurs, assez long", "meta": {"lang": "fr"}}\n'
        + b'{"text": "it says it has few words", "meta": {"lang": "en", "word_count": 2}}\n'
    )
    (tmp_path / "a.jsonl").write_bytes(lines)
    manifest = shard.shard(
        [str(tmp_path / "a.jsonl")],
        tokenizer,
        tmp_path / "out",
        validation_fraction=0.1,
        test_fraction=0.2,
        min_tokens=9,
        languages=("en",),
        min_words=1,
        on_error="skip",
    )
    assert manifest["dropped"] == {"duplicate": 2, "too_short": 1, "language": 1}
    assert manifest["skipped"] == {"empty": 1, "no_text": 1, "broken_json": 1, "invalid_utf8": 1}
    documents = {name: split["documents"] for name, split in manifest["splits"].items()}
    assert sum(documents.values()) == len(TEXTS) + 2
    assert 25 < documents["test"] < 75
    assert 8 < documents["validation"] < 45
    assert "one part\n\nanother" in texts_of(tmp_path / "out").values()
    for name, split in manifest["splits"].items():
        for entry in split["shards"]:
            index = TarIndex(tmp_path / "out" / entry["file"])
            assert (len(index), int(index.lengths.sum())) == (entry["samples"], entry["tokens"])
            record = json.loads(index.json(0))
            assert record["split"] == name
            assert record["n_tokens"] == index.lengths[0]
    inspect_shards.main([str(tmp_path / "out"), "--verify"])


def test_a_text_never_changes_its_split(tokenizer: str, tmp_path: Path) -> None:
    splits: list[dict[str, str]] = []
    for count in (120, 240):
        (tmp_path / f"{count}.jsonl").write_bytes(json_lines(TEXTS[:count]))
        shard.shard([str(tmp_path / f"{count}.jsonl")], tokenizer, tmp_path / f"o{count}", test_fraction=0.3)
        tar_of = {}
        for path in (tmp_path / f"o{count}").glob("*.tar"):
            index = TarIndex(path)
            tar_of.update({index.key(i).split("-")[1]: path.name for i in range(len(index))})
        splits.append(tar_of)
    assert splits[0].items() <= splits[1].items()


def test_problems_name_file_and_line_and_are_counted(tokenizer: str, tmp_path: Path) -> None:
    lines = json_lines(TEXTS[:20])
    whole = zstandard.ZstdCompressor(write_content_size=False).compress(json_lines(TEXTS[20:]))
    cases: dict[str, tuple[bytes, str, str]] = {
        "json.jsonl": (lines + b"{broken\n", r"json\.jsonl, line 21: not JSON", "broken_json"),
        "utf8.jsonl": (lines + b'{"text": "\xff"}', r"utf8\.jsonl, line 21: not UTF-8", "invalid_utf8"),
        "text.jsonl": (lines + b'{"body": 1}', r"text\.jsonl, line 21: has no `text`.*its keys are body", "no_text"),
        "list.jsonl": (lines + b"[1]", r"list\.jsonl, line 21: has no `text`", "no_text"),
        "empty.jsonl": (lines + b'{"text": " "}', r"empty\.jsonl, line 21: the document is empty", "empty"),
        "bytes.txt": (b"one\n<|endoftext|>two\n\xff", r"bytes\.txt, document 2, its line 2", "invalid_utf8"),
        "cut.jsonl.gz": (gzip.compress(lines)[:-30], r"cut\.jsonl\.gz: cannot be read to its end", "truncated_input"),
        "cut.jsonl.zst": (whole[:-30], r"cut\.jsonl\.zst: cannot be read to its end .*breaks off", "truncated_input"),
        "bad.jsonl.zst": (b"no zstd", r"bad\.jsonl\.zst: cannot be read to its end", "truncated_input"),
        "bad.jsonl.zst.tar": (b"no tar" * 99, r"bad\.jsonl\.zst\.tar: cannot be read", "truncated_input"),
        "bad.parquet": (b"no table", r"bad\.parquet: cannot be read to its end", "truncated_input"),
    }
    (tmp_path / "zz.jsonl").write_bytes(lines)
    for number, (name, (content, message, cause)) in enumerate(cases.items()):
        (tmp_path / name).write_bytes(content)
        inputs = [str(tmp_path / name), str(tmp_path / "zz.jsonl")]
        with pytest.raises(DataError, match=f"{message}.*--on-error skip"):
            shard.shard(inputs, tokenizer, tmp_path / f"stop{number}")
        manifest = shard.shard(inputs, tokenizer, tmp_path / f"skip{number}", on_error="skip")
        assert manifest["skipped"] == {cause: 1}, name
        assert sum(split["documents"] for split in manifest["splits"].values()) >= 20, name


def test_text_files_are_split_where_the_separator_stands(tokenizer: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(raw_readers, "BLOCK_BYTES", 7)  # separators lie across blocks
    (tmp_path / "a.txt").write_text("one\n\ntwo--three é--\n--four")
    shard.shard([str(tmp_path / "a.txt")], tokenizer, tmp_path / "out", separator="--")
    assert sorted(texts_of(tmp_path / "out").values()) == sorted(["one\n\ntwo", "three é", "four"])


def test_local_hugging_face_datasets(tokenizer: str, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS[:30], "url": [str(i) for i in range(30)]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "many")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(json_lines(TEXTS[:30]))
    for number, name in enumerate(("one:any", "many:validation", "files:train")):
        shard.shard([f"hf:{tmp_path}/{name}"], tokenizer, tmp_path / f"out{number}")
        assert sorted(texts_of(tmp_path / f"out{number}").values()) == sorted(TEXTS[:30])
    with pytest.raises(DataError, match="cannot be loaded"):
        shard.shard([f"hf:{tmp_path}/nowhere:train"], tokenizer, tmp_path / "out9")


def test_files_of_one_name_have_keys_of_their_own(tokenizer: str, tmp_path: Path) -> None:
    for number, folder in enumerate("abc"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(json_lines(TEXTS[10 * number : 10 * number + 10]))
    shard.shard([str(tmp_path / folder) for folder in "abc"], tokenizer, tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 30
    assert {key.rpartition("-")[0] for key in texts_of(tmp_path / "out")} == {"x", "x-2", "x-3"}


def test_bad_input_is_named(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(path: str, **options: Any) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(DataError) as caught:
            shard.shard([path], options.pop("tokenizer", tokenizer), tmp_path / "out", **options)
        return str(caught.value)

    assert "absent.jsonl: no such input" in error(str(tmp_path / "absent.jsonl"))
    (tmp_path / "x.doc").touch()
    assert "unknown kind of file" in error(str(tmp_path / "x.doc"))
    (tmp_path / "empty.jsonl").touch()
    assert "no document was kept" in error(str(tmp_path / "empty.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    assert "--tokenizer" in error(str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "file" / "out")
    with pytest.raises(SystemExit) as exit_status:
        shard.main(["--input", str(tmp_path / "absent"), "--tokenizer", tokenizer, "--output", str(tmp_path / "o")])
    assert exit_status.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("damage", ["header", "cut between members", "cut in a header"])
def test_a_damaged_release_is_not_taken_for_its_end(damage: str, tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "openwebtext2.jsonl.zst.tar"
    with tarfile.open(path, "w") as tar:
        for month in range(3):
            content = zstandard.ZstdCompressor().compress(json_lines(TEXTS[80 * month : 80 * month + 80]))
            info = tarfile.TarInfo(f"2005-0{month}.jsonl.zst")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[third + 5] ^= 1
    cut = {"header": len(content), "cut between members": third, "cut in a header": third + 100}[damage]
    path.write_bytes(bytes(content[:cut]))
    with pytest.raises(DataError, match=rf"{path}: cannot be read to its end .*at byte {third}"):
        shard.shard([str(path)], tokenizer, tmp_path / "stop")
    manifest = shard.shard([str(path)], tokenizer, tmp_path / "skip", on_error="skip")
    assert manifest["skipped"] == {"truncated_input": 1}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 160


def test_after_a_broken_line_one_goes_on_with_skip(tokenizer: str, tmp_path: Path) -> None:
    lines = json_lines(TEXTS).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:150], b"{broken\n", *lines[150:]]))
    whole = shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "whole", on_error="skip")
    with pytest.raises(DataError, match="a.jsonl, line 151: not JSON"):
        shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out")
    again = shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out", on_error="skip", resume=True)
    assert again == whole
    assert again["skipped"] == {"broken_json": 1}


def test_metadata_of_any_kind_is_written(tokenizer: str, tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": TEXTS[0], "meta": {"title": "half \ud83d", "ok": "\U0001f600", "n": 3}})
        + "\n" + '{"text": "deep", "meta": ' + '{"a":' * 5000 + "1" + "}" * 5001 + "\n"
    )  # fmt: skip
    when, price = datetime.datetime(2020, 4, 1), decimal.Decimal("1.50")
    pq.write_table(
        pa.table({"text": [TEXTS[1]], "when": [when], "price": [price], "raw": [b"x"]}), tmp_path / "b.parquet"
    )
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "c.parquet")
    inputs = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.parquet")]
    manifest = shard.shard(inputs, tokenizer, tmp_path / "out", on_error="skip", validation_fraction=0, test_fraction=0)
    assert manifest["skipped"] == {"broken_json": 1, "unreadable_input": 1}
    index = TarIndex(tmp_path / "out" / "train-000000.tar")
    first, second = (json.loads(index.json(i)) for i in range(2))
    assert (first["title"], first["ok"], first["n"]) == ("half \ufffd", "\U0001f600", 3)
    assert (second["when"], second["price"], second["raw"]) == (str(when), "1.50", str(b"x"))
    with pytest.raises(DataError, match="c.parquet: has no column `text`, only body"):
        shard.shard(inputs[2:], tokenizer, tmp_path / "stop")


def test_verify_finds_damage(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[TarIndex(path).offsets[5]] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        inspect_shards.main([str(tmp_path / "out"), "--verify"])
    assert "train-000000.tar: sha256" in capsys.readouterr().err
    (tmp_path / "out" / "validation-000000.tar").unlink()
    with pytest.raises(SystemExit):
        inspect_shards.main([str(tmp_path / "out"), "--verify"])
    told = capsys.readouterr().err
    assert "train-000000.tar: sha256" in told and "validation-000000.tar: missing" in told, "all that is wrong"


def test_openwebtext2_layout(shared_data: Path, tokenizer: str, tmp_path: Path) -> None:
    folder = shared_data / "web" / "owt2_layout"
    inputs = sorted(str(p) for p in folder.glob("*.jsonl.zst"))
    one = shard.shard(inputs, tokenizer, tmp_path / "one", limit=60)
    two = shard.shard([str(folder / "openwebtext2.jsonl.zst.tar")], tokenizer, tmp_path / "two", limit=60)
    assert [s["tokens"] for s in one["splits"].values()] == [s["tokens"] for s in two["splits"].values()]


def test_openwebtext2_with_qwen3_as_webdataset_reads_it(shared_data: Path, tmp_path: Path) -> None:
    import webdataset

    archive, qwen3 = (
        shared_data / "web" / "owt2_layout" / "openwebtext2.jsonl.zst.tar",
        shared_data / "tokenizers" / "qwen3",
    )
    manifest = shard.shard(
        [str(archive)], str(qwen3), tmp_path / "out", limit=30, validation_fraction=0, test_fraction=0
    )
    assert (manifest["tokenizer"]["eos_id"], manifest["tokenizer"]["vocab_size"]) == (151_643, 151_669)
    chunks = sources.read([str(archive)])
    originals = {d.key: d.text for chunk in chunks for d in sources.decode(chunk)[0]}
    tokenizer = load_tokenizer(qwen3)
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False).decode())
    assert len(samples) == 30
    for sample in samples:
        tokens = sample["tokens.npy"]
        assert tokens.dtype == "uint32" and tokens[-1] == 151_643 and 151_643 not in tokens[:-1]
        assert tokenizer.decode(tokens.tolist()) == originals[sample["__key__"]]
        assert sample["json"]["n_tokens"] == len(tokens)
