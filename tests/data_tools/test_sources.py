"""Readers of raw text: separators, blocks, an archive with its published text."""

import io
import os
from pathlib import Path

from data_tools import sources
from data_tools.raw_readers import BLOCK_BYTES, text_documents
from tests.data_tools.test_shard import TEXTS


def test_a_file_is_one_document_without_a_separator(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{TEXTS[0]}<|endoftext|>{TEXTS[1]}")
    for separator, count in (("<|endoftext|>", 2), ("", 1), ("absent", 1)):
        documents = [
            d for c in sources.read([str(tmp_path / "a.txt")], separator=separator) for d in sources.decode(c)[0]
        ]
        assert len(documents) == count
    blocks = b"".join(b"x" * (n % 7 + BLOCK_BYTES - 5) + b"<|endoftext|>" for n in range(4))  # across blocks
    found = list(text_documents(io.BytesIO(blocks), b"<|endoftext|>"))
    assert found == [document for document in blocks.split(b"<|endoftext|>") if document]


def test_lm_dataformat_archive(shared_data: Path) -> None:
    path = shared_data / "web" / "lm_dataformat_test" / "blns.jsonl.zst.tar"
    documents = [d for chunk in sources.read([str(path)]) for d in sources.decode(chunk)[0]]
    assert len({d.key for d in documents}) == len(documents)
    naughty = path.with_name("blns.txt").read_text().strip()
    written = [naughty, "testing 123\n\ntesting 345", naughty, "testing 123456789"]  # as lm_dataformat's own test
    assert [d.text for d in documents] == written * 2


def test_an_input_is_told_by_its_content_not_by_its_time(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 12_000)  # 3 MB: more than both ends
    whole = sources.describe([str(path)])
    os.utime(path, (0, 0))
    assert sources.describe([str(path)]) == whole
    for place in 0, 2**20 - 1, path.stat().st_size - 1:
        changed = bytearray(path.read_bytes())
        changed[place] ^= 1
        path.write_bytes(changed)
        assert sources.describe([str(path)]) != whole
        changed[place] ^= 1
        path.write_bytes(changed)
    path.write_bytes(path.read_bytes() + b"x")
    assert sources.describe([str(path)])[0]["bytes"] == 256 * 12_000 + 1
    for small in b"", b"a", bytes(2**20 + 5):
        path.write_bytes(small)
        assert sources.describe([str(path)])[0]["bytes"] == len(small)
