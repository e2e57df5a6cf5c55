"""Shards behind http, s3 and a pipe: the same batches as local ones, through dropped connections, or a clear end."""

import functools
import http.server
import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from megatext.data import DataError, remote
from megatext.data.shards import files_of
from megatext.data.stream import DataConfig, TokenStream
from tests.data.corpus import write_corpus
from tests.data.test_hidden_states import write_states

LENGTHS = [int(n) for n in np.random.default_rng(1).integers(2, 60, 80)]


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `drops[name]` requests for a file end in the middle, `missing` names are not there."""

    def __init__(self, folder: Path) -> None:
        self.drops: Counter[str] = Counter()
        self.missing: set[str] = set()
        self.asked: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked[name] += 1
        if name in self.server.missing:
            self.send_error(404)
        elif self.server.drops[name] > 0:
            self.server.drops[name] -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "shards", LENGTHS, per_shard=20)
    return tmp_path / "shards"


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    with Server(corpus) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    remote.local_folder.cache_clear()
    return tmp_path / "cache"


def stream(place: str) -> TokenStream:
    return TokenStream(DataConfig(place, row_tokens=64, max_tokens=48), seed=0, rows_per_step=4)


def assert_same_batches(place: str, corpus: Path) -> None:
    here, there = stream(str(corpus)), stream(place)
    assert there.order_fingerprint == here.order_fingerprint
    for sample in (0, 60):
        one, other = (s.batch(s.plan(sample), slice(None)) for s in (here, there))
        assert torch.equal(one.tokens, other.tokens) and list(one.documents) == list(other.documents)


def test_http_with_dropped_connections_gives_the_same_batches(
    server: Server, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.drops |= {"train-000001.tar": 2, "manifest.json": 1}
    assert_same_batches(server.address, corpus)
    assert server.asked["train-000001.tar"] == 3
    told = capsys.readouterr().err
    assert f"{server.address}: train-000001.tar: the transfer ended with status 18; attempt 2 in" in told
    stream(server.address + "/")  # another address: a copy of its own
    asked = server.asked["train-000000.tar"]
    remote.local_folder.cache_clear()  # as a new process
    stream(server.address)
    assert server.asked["train-000000.tar"] == asked, "what is there is not fetched again"


def test_a_server_that_never_delivers_is_a_clear_error(server: Server, cache: Path) -> None:
    server.drops["train-000002.tar"] = 99
    with pytest.raises(DataError, match=r"train-000002.tar could not be fetched in 6 attempts: .* status 18"):
        stream(server.address)
    assert server.asked["train-000002.tar"] == 6
    assert not list(cache.rglob("*.partial")), "nothing half-written is left"
    server.missing.add("manifest.json")
    remote.local_folder.cache_clear()
    with pytest.raises(DataError, match=r"manifest.json could not be fetched in 6 attempts: .* status 22"):
        stream(server.address)


def test_other_bytes_than_the_manifest_says_name_the_shard(server: Server, corpus: Path) -> None:
    path = corpus / "train-000001.tar"
    damaged = bytearray(path.read_bytes())
    damaged[1500] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"train-000001.tar could not be fetched.*its sha256 is .*, the manifest says"):
        stream(server.address)
    with pytest.raises(DataError, match=r"train-000001.tar: its sha256 is .*, the manifest says"):
        stream(str(corpus))


def test_a_copy_that_was_damaged_later_is_noticed(server: Server, cache: Path) -> None:
    stream(server.address)
    (copy,) = cache.rglob("train-000000.tar")
    copy.write_bytes(copy.read_bytes()[:-1024] + bytes(1023) + b"x")
    remote.local_folder.cache_clear()
    with pytest.raises(DataError, match=r"train-000000.tar: its sha256 is .* let it be fetched"):
        stream(server.address)
    copy.write_bytes(b"short")
    stream(server.address)


def test_what_is_no_manifest_is_asked_for_again(server: Server, corpus: Path) -> None:
    whole = (corpus / "manifest.json").read_text()
    (corpus / "manifest.json").write_text(whole[:-40])
    with pytest.raises(DataError, match=rf"{server.address}: manifest.json could not .* what came is not the manifest"):
        stream(server.address)
    assert server.asked["manifest.json"] == 6


def test_teacher_states_and_a_tokenizer_behind_http(tmp_path: Path, corpus: Path, server: Server) -> None:
    (corpus / "tokenizer").mkdir()
    (corpus / "tokenizer" / "vocab.txt").write_text("a b c")
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["tokenizer"]["files"] = files_of(corpus, "tokenizer")
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    assert (remote.local_folder(server.address) / "tokenizer" / "vocab.txt").read_text() == "a b c"
    write_states(corpus, corpus / "states", "int8", [("train-000000.tar", 0, 20), ("train-000002.tar", 3, 9)], 48)
    config = {"row_tokens": 64, "max_tokens": 48}
    batches = []
    for shards, states in ((str(corpus), str(corpus / "states")), (server.address, f"{server.address}/states")):
        found = TokenStream(DataConfig(shards, hidden_states=states, **config), seed=0, rows_per_step=4)
        batches.append(found.batch(found.plan(0), slice(None)))
    assert batches[0].hidden_valid is not None and batches[0].hidden_valid.any()
    assert torch.equal(batches[0].hidden_valid, batches[1].hidden_valid)
    assert torch.equal(batches[0].hidden, batches[1].hidden)


def test_pipe_command_and_s3(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_batches(f"pipe:cat {corpus}/{{}}", corpus)
    with pytest.raises(DataError, match="needs {} where the name of the file belongs"):
        stream("pipe:cat here")
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(  # `aws s3 cp --only-show-errors s3://bucket/folder/NAME -`, with the folder for a bucket
        f"#!{sys.executable}\nimport sys\n"
        "assert sys.argv[1:4] == ['s3', 'cp', '--only-show-errors'] and sys.argv[5:] == ['-']\n"
        "name = sys.argv[4].removeprefix('s3://bucket/folder/')\n"
        f"sys.stdout.buffer.write(open({str(corpus)!r} + '/' + name, 'rb').read())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert_same_batches("s3://bucket/folder", corpus)
    program.unlink()
    remote.local_folder.cache_clear()
    with pytest.raises(DataError, match="the program that reads such places, aws, is not installed"):
        stream("s3://bucket/folder")


def test_too_small_a_disk_is_noticed_before_anything_is_fetched(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"GB are to be fetched.*has room for 0.0 GB; set MEGATEXT_CACHE"):
        stream(server.address)
    assert not server.asked["train-000000.tar"]


def test_processes_share_one_copy(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:  # a lock is between open files: threads stand for processes
        streams = list(pool.map(stream, [server.address] * 4))
    assert {s.order_fingerprint for s in streams} == {streams[0].order_fingerprint}
    assert server.asked["train-000003.tar"] == 1


def test_a_new_manifest_is_another_copy(server: Server, corpus: Path) -> None:
    before = stream(server.address).order_fingerprint
    shutil.rmtree(corpus)
    write_corpus(corpus, LENGTHS[::-1], per_shard=20)
    assert json.loads((corpus / "manifest.json").read_text())["splits"]["train"]["documents"] == len(LENGTHS)
    remote.local_folder.cache_clear()
    assert stream(server.address).order_fingerprint != before
