"""Tars as we write them, against tarfile."""

import io
import tarfile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatext.data.shards import _header, sample_bytes

NAMES = st.one_of(
    st.from_regex(r"[A-Za-z0-9_/.-]{1,100}", fullmatch=True),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=130),
)


@given(NAMES.filter(lambda name: "\0" not in name), st.one_of(st.integers(0, 10**7), st.integers(8**11 - 2, 8**11 + 2)))
def test_headers_are_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert _header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def test_a_sample_is_a_tar() -> None:
    content = sample_bytes("a-7", {"tokens": np.arange(5, dtype=np.uint16)}, {"title": "\u00e4"})
    with tarfile.open(fileobj=io.BytesIO(content + bytes(1024))) as tar:
        assert tar.getnames() == ["a-7.tokens.npy", "a-7.json"]
        member = tar.extractfile("a-7.tokens.npy")
        assert member is not None
        assert np.load(io.BytesIO(member.read())).tolist() == [0, 1, 2, 3, 4]
