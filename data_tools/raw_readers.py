"""Bytes of a file to lines or documents, in blocks: nothing but the item at hand is held."""

from collections.abc import Iterator
from typing import IO, BinaryIO

BLOCK_BYTES = 1 << 20
"""Read at once."""


def zstd_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines. OpenWebText2's files are one frame without its content's size, so they cannot be read at once; and a
    frame that breaks off is an error, which zstandard's own stream reader keeps to itself."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    rest, inside = b"", False
    try:
        while block := stream.read(BLOCK_BYTES):
            while block:
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                inside, block = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if inside:
        raise EOFError("its zstd frame breaks off")
    if rest:
        yield rest


def text_documents(file: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """Documents between separators, or the whole file where that is empty; what is blank is none."""
    held = bytearray()
    while block := file.read(BLOCK_BYTES):
        start = max(0, len(held) + 1 - len(separator))
        held += block
        if separator and held.find(separator, start) >= 0:
            *whole, rest = held.split(separator)
            held = rest
            yield from (bytes(document) for document in whole if document.strip())
    if held.strip():
        yield bytes(held)
