"""Sharding that is interrupted, killed, out of disk or run twice: nothing is lost, and the bytes are the same."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_tools import shard, sources
from megatext.data import DataError
from tests.data_tools.test_shard import ROOT, TEXTS, json_lines, trained_tokenizer, tree


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_workers_and_interruptions_change_nothing(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DOCUMENTS_PER_CHUNK", 16)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    options: dict[str, Any] = {"shard_tokens": 700, "test_fraction": 0.2}
    inputs = [str(tmp_path / "a.jsonl")]
    shard.shard(inputs, tokenizer, tmp_path / "one", **options)
    shard.shard(inputs, tokenizer, tmp_path / "two", workers=2, **options)
    assert len(list((tmp_path / "one").glob("train-*.tar"))) > 3
    assert tree(tmp_path / "one") == tree(tmp_path / "two")

    monkeypatch.setattr(shard, "SNAPSHOT_SECONDS", 0.0)
    calls = 0
    encode = shard.encode_chunk

    def interrupted(chunk: sources.Chunk) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return encode(chunk)

    monkeypatch.setattr(shard, "encode_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard.shard(inputs, tokenizer, tmp_path / "three", **options)
    assert not (tmp_path / "three" / "manifest.json").exists()
    with pytest.raises(DataError, match="--resume"):
        shard.shard(inputs, tokenizer, tmp_path / "three", **options)
    with pytest.raises(DataError, match="other inputs or settings"):
        shard.shard(inputs, tokenizer, tmp_path / "three", resume=True, shard_tokens=701)
    assert 0 < calls < 15
    shard.shard(inputs, tokenizer, tmp_path / "three", resume=True, **options)
    assert calls == 1 + 15, "what was encoded before the interruption is not encoded again, but for one chunk"
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    shard.shard(inputs, tokenizer, tmp_path / "three", resume=True, **options)


RUN = """
import sys
from data_tools import shard, sources
shard.SNAPSHOT_SECONDS, sources.DOCUMENTS_PER_CHUNK = 0.02, 8
shard.main(sys.argv[1:])
"""


@pytest.mark.dist
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tokenizer: str, tmp_path: Path, workers: int) -> None:
    """kill -9, again and again, at moments that nobody chose."""
    texts = [f"{text} {copy}" for copy in range(60) for text in TEXTS]
    data = json_lines([*texts, *TEXTS[:50], *texts[:500]])
    half = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "a.jsonl").write_bytes(data[:half])
    frames = zstandard.ZstdCompressor(write_content_size=False)
    (tmp_path / "b.jsonl.zst").write_bytes(frames.compress(data[half:]))
    options = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.zst"), "--tokenizer", tokenizer]
    options += ["--shard-tokens", "20000", "--test-fraction", "0.2", "--workers", str(workers)]
    command = [sys.executable, "-c", RUN, *options]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
    output, kills, last = tmp_path / "killed", 0, -1
    while not (output / "manifest.json").exists():
        with open(tmp_path / "log", "wb") as log:
            run = subprocess.Popen([*command, "--output", str(output), "--resume"], cwd=ROOT, stdout=log, stderr=log)
            while kills < 6 and run.poll() is None:
                time.sleep(0.005)
                if progress_of(output) > last + 300:
                    time.sleep(0.013 * (kills % 3))
                    run.kill()
                    kills, last = kills + 1, progress_of(output)
            assert run.wait(timeout=120) in (0, -9), (tmp_path / "log").read_text()
    assert kills >= 3
    assert tree(output) == tree(tmp_path / "whole")


def progress_of(output: Path) -> int:
    """Documents of the last snapshot."""
    try:
        counts = json.loads((output / ".progress.json").read_text())["counts"]
    except (OSError, ValueError):
        return -1
    return sum(count["documents"] for count in counts.values())


def test_a_limit_holds_through_an_interruption_at_the_very_end(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "SNAPSHOT_SECONDS", 0.0)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    inputs = [str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sources, "DOCUMENTS_PER_CHUNK", 16)
    shard.shard(inputs, tokenizer, tmp_path / "whole", limit=24)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard._Corpus, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shard.shard(inputs, tokenizer, tmp_path / "out", limit=24)
    manifest = shard.shard(inputs, tokenizer, tmp_path / "out", limit=24, resume=True)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 24
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_full_disk_is_told_and_resumed(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    inputs = [str(tmp_path / "a.jsonl")]
    shard.shard(inputs, tokenizer, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(DataError, match="writing failed .*free some space and run again with --resume"):
            shard.shard(inputs, tokenizer, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shard.shard(inputs, tokenizer, tmp_path / "full", resume=True)
    assert tree(tmp_path / "full") == tree(tmp_path / "whole")


def test_two_runs_do_not_write_into_one_folder(tokenizer: str, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".writing", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing here"):
            shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out")
    shard.shard([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "out")
