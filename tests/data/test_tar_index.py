"""The tar index against tarfile and webdataset, its cache, and damaged files."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatext.data import DataError
from megatext.data.shards import ShardWriter
from megatext.data.tar_index import TarIndex, walk

DOCUMENTS = {f"doc-{i:03d}": np.arange(i, 3 * i + 1, dtype=np.uint16) for i in range(20)}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path / "train-000000.tar")
    for key, tokens in DOCUMENTS.items():
        writer.add(key, {"tokens": tokens}, {"title": key.upper()}, len(tokens))
    entry = writer.close()
    assert entry["samples"] == 20
    assert entry["bytes"] == (tmp_path / "train-000000.tar").stat().st_size
    return tmp_path / "train-000000.tar"


def check(index: TarIndex) -> None:
    assert index.keys == list(DOCUMENTS)
    for i, (key, tokens) in enumerate(DOCUMENTS.items()):
        assert index.key(i) == key
        assert np.array_equal(index.array(i), tokens)
        assert np.array_equal(index.array(i, 2, 5), tokens[2:5])
        assert key.upper().encode() in index.json(i)


def test_reads_what_was_written_and_caches(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(TarIndex(shard))
    assert len(list(shard.parent.glob("*.index.npz"))) == 1
    monkeypatch.setattr(TarIndex, "_build", lambda *_: pytest.fail("the cache was not used"))
    check(TarIndex(shard))


def test_a_stale_or_broken_cache_is_rebuilt(shard: Path) -> None:
    TarIndex(shard)
    cache = next(shard.parent.glob("*.index.npz"))
    os.utime(shard, ns=(1, 1))
    check(TarIndex(shard))
    cache.write_bytes(b"broken")
    check(TarIndex(shard))
    check(TarIndex(shard))


def test_works_where_nothing_can_be_written(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    check(TarIndex(shard))
    assert not list(shard.parent.glob("*.npz")), "no temporary file is left behind"


def test_webdataset_reads_the_shard(shard: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == list(DOCUMENTS)
    for sample, (key, tokens) in zip(samples, DOCUMENTS.items(), strict=True):
        assert np.array_equal(sample["tokens.npy"], tokens)
        assert sample["json"]["title"] == key.upper()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_walks_every_tar_format(form: int, tmp_path: Path) -> None:
    path = tmp_path / "any.tar"
    names = ["a.txt", "folder/b.txt", "folder/" + "long" * 20 + "/c.txt", "x" * 90 + ".json"]
    if form != tarfile.USTAR_FORMAT:
        names += ["deep/" + "y" * 200 + ".txt", "u\u00e9.txt"]
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 * i
            tar.addfile(info, io.BytesIO(bytes([65 + i]) * info.size))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        tar.addfile(link)
    data = path.read_bytes()
    found = list(walk(memoryview(data), "any.tar"))
    assert [name for name, _, _ in found] == names
    assert [data[start : start + size] for _, start, size in found] == [
        bytes([65 + i]) * 100 * i for i in range(len(names))
    ]


@pytest.mark.parametrize(("keep", "message"), [(600, "cut off"), (1024, "end-of-archive"), (0, "empty")])
def test_truncated_files_are_refused(shard: Path, keep: int, message: str) -> None:
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"train-000000.tar.*{message}"):
        TarIndex(shard)


def test_damaged_and_missing_files_are_refused(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"checksum.*byte 0"):
        TarIndex(shard)
    shard.unlink()
    with pytest.raises(DataError, match="no such shard"):
        TarIndex(shard)


def test_in_a_read_only_folder_the_index_is_kept_elsewhere(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    check(TarIndex(shard))
    assert not list(shard.parent.glob("*.npz"))
    monkeypatch.setattr(TarIndex, "_build", lambda *_: pytest.fail("the cache was not used"))
    check(TarIndex(shard))


def test_the_checksum_is_compared_once_and_again_when_the_file_changes(shard: Path) -> None:
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    TarIndex(shard)  # an index without a checksum does not count as checked
    with pytest.raises(DataError, match=f"its sha256 is {digest}, the manifest says {'0' * 64}"):
        TarIndex(shard, sha256="0" * 64)
    check(TarIndex(shard, sha256=digest))
    content = bytearray(shard.read_bytes())
    content[int(TarIndex(shard).offsets[0])] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match="its sha256 is"):
        TarIndex(shard, sha256=digest)


def test_more_shards_than_files_are_allowed_to_begin_with(shard: Path) -> None:
    program = (
        "import resource, sys\n_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))\nfrom megatext.data.tar_index import TarIndex\n"
        "held = [TarIndex(sys.argv[1]) for _ in range(100)]\nprint(len(held))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(shard)], capture_output=True, text=True, check=False)
    assert done.stdout == "100\n", done.stderr
