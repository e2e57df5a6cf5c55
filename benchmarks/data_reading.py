"""Reading packed rows against the peers: `python benchmarks/data_reading.py`.

The same documents as webdataset shards (ours), MosaicML's MDS and a Hugging Face dataset on the local disk; each reader
gives them in a shuffled order as rows of 1024 tokens with segment and position ids, in one process, one epoch. Peers
get one packing loop, next-fit over their documents, which is less work than ours (best fit). Then, for ours: the time
to the first batch at 0 % and at 90 % of an epoch, and the memory of the index.
"""

import argparse
import importlib.machinery
import importlib.util
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import best_of, documents, report, write_shards

from megatext.data.stream import DataConfig, TokenStream

ROW_TOKENS = 1024
ROWS = 64
"""Rows of a batch."""
_MEMORY = """
import sys
from megatext.data.stream import DataConfig, TokenStream
def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))
TokenStream(DataConfig(sys.argv[1]), seed=0, rows_per_step=4)  # what is imported and allocated once
before = anonymous()
stream = TokenStream(DataConfig(sys.argv[2]), seed=0, rows_per_step=4)
for sample in range(0, 4000, 40):
    stream.batch(stream.plan(sample), slice(None))
print(anonymous() - before)
"""


def pack(texts: Iterable[np.ndarray]) -> int:
    """Make batches of (tokens, segment, position) in rows, next fit, as people write it around such readers, and drop
    them; the number of tokens."""

    def empty() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = (ROWS, ROW_TOKENS)
        return np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64)

    total, batch, row, at, piece = 0, empty(), 0, 0, 0
    for text in texts:
        total += len(text)
        for start in range(0, len(text), ROW_TOKENS):
            window = text[start : start + ROW_TOKENS]
            if at + len(window) > ROW_TOKENS:
                row, at, piece = row + 1, 0, 0
                if row == ROWS:
                    tuple(map(torch.from_numpy, batch))
                    batch, row = empty(), 0
            end = at + len(window)
            batch[0][row, at:end], batch[1][row, at:end] = window, piece
            batch[2][row, at:end] = np.arange(len(window))
            at, piece = end, piece + 1
    return total


def ours(folder: Path) -> int:
    stream = TokenStream(
        DataConfig(str(folder), row_tokens=ROW_TOKENS, max_tokens=ROW_TOKENS), seed=0, rows_per_step=ROWS
    )
    sample, tokens = 0, 0
    while sample < stream.sources[0].windows:
        plan = stream.plan(sample)
        stream.batch(plan, slice(None))
        tokens += plan.tokens
        sample = plan.next_sample
    return tokens


def webdataset_reader(folder: Path) -> Callable[[], int]:
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))

    def read() -> int:
        data = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).decode()
        return pack(sample["tokens.npy"] for sample in data)

    return read


def hugging_face_reader(folder: Path, texts: Callable[[], Iterable[np.ndarray]]) -> dict[str, Callable[[], int]]:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"))})
    rows = datasets.Dataset.from_generator(
        lambda: ({"tokens": text} for text in texts()), features=features, cache_dir=str(folder / "cache")
    )
    rows.save_to_disk(str(folder / "saved"))

    def read(batch: int) -> int:
        data = (
            datasets.load_from_disk(str(folder / "saved"))
            .with_format("numpy")
            .shuffle(seed=0, load_from_cache_file=False)
        )
        if batch == 1:
            return pack(row["tokens"] for row in data)
        return pack(text for rows in data.iter(batch) for text in rows["tokens"])

    return {"datasets, row by row": lambda: read(1), "datasets, 256 rows at once": lambda: read(256)}


def mosaic_reader(folder: Path, texts: Iterable[np.ndarray]) -> dict[str, Callable[[], int]]:
    streaming = _streaming()
    with streaming.MDSWriter(out=str(folder), columns={"tokens": "bytes"}) as writer:  # faster than its ndarray
        for text in texts:
            writer.write({"tokens": text.tobytes()})

    def read(**options: int) -> int:
        data = streaming.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=1, **options)
        return pack(np.frombuffer(sample["tokens"], np.uint16) for sample in data)

    # by default it looks 8 samples ahead, and then waits for its own clock
    return {"mosaicml-streaming": read, "mosaicml-streaming, predownload": lambda: read(predownload=1_000_000)}


def _streaming() -> Any:
    """mosaicml-streaming. It imports torchvision for its image datasets, which nothing here needs: where there is none
    (as with some CPU builds of torch), an empty one stands in."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module: Any = types.ModuleType(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.__path__, module.VisionDataset, module.to_tensor = [], object, None
            sys.modules[module.__name__] = module
    import streaming

    return streaming


def first_batch(folder: Path, share: float, windows: int) -> float:
    """Seconds from nothing to the first batch of a run that continues at this share of an epoch."""
    start = time.perf_counter()
    stream = TokenStream(
        DataConfig(str(folder), row_tokens=ROW_TOKENS, max_tokens=ROW_TOKENS), seed=0, rows_per_step=ROWS
    )
    stream.batch(stream.plan(int(share * windows)), slice(None))
    return time.perf_counter() - start


def index_bytes_a_document(folder: Path) -> float:
    """Memory of a stream's own a document: of 200,000 short ones, with its batches read all over them."""
    for name, number in (("few", 1000), ("many", 200_000)):
        write_shards(folder / name, (np.full(12, 5, np.uint16) for _ in range(number)))
    program = [sys.executable, "-c", _MEMORY, str(folder / "few")]
    for _ in range(2):  # the first time builds the indexes
        out = subprocess.run([*program, str(folder / "many")], check=True, capture_output=True, text=True).stdout
    return int(out) / 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--mean-tokens", type=float, default=1000, help="of a document; OpenWebText2 has about 900")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def texts() -> Iterator[np.ndarray]:
            return documents(options.documents, options.mean_tokens, 0)

        total = write_shards(folder / "shards", texts())
        readers: dict[str, Callable[[], int]] = {"megatext": lambda: ours(folder / "shards")}
        readers["webdataset"] = webdataset_reader(folder / "shards")
        readers |= hugging_face_reader(folder / "datasets", texts)
        try:
            readers |= mosaic_reader(folder / "mds", texts())
        except ImportError as error:
            print(f"mosaicml-streaming is left out ({error}); pip install -r benchmarks/requirements.txt")

        def timed(read: Callable[[], int]) -> float:
            start = time.perf_counter()
            tokens = read()
            rate = tokens / (time.perf_counter() - start)
            # ours ends an epoch with a whole step, which reaches into the next one
            assert total <= tokens <= total + ROWS * ROW_TOKENS, (tokens, total)
            return rate

        rates = best_of({name: lambda read=read: timed(read) for name, read in readers.items()}, options.repeats)
        windows = TokenStream(DataConfig(str(folder / "shards")), seed=0, rows_per_step=1).sources[0].windows
        resume = best_of(
            {share: lambda share=share: -first_batch(folder / "shards", share, windows) for share in (0.0, 0.5, 0.9)}, 7
        )
        index = index_bytes_a_document(folder)
    rows = [[name, f"{rate / 1e6:,.1f}", f"{rates['megatext'] / rate:,.1f}"] for name, rate in rates.items()]
    rows += [
        [f"first batch at {share:.0%} of an epoch, ms", f"{-1e3 * s:,.1f}", f"{s / resume[0.0]:.2f}"]
        for share, s in resume.items()
    ]
    rows.append(["index, bytes of memory a document", f"{index:.1f}", ""])
    figures = {
        "tokens": total,
        "tokens_per_second": rates,
        "first_batch_seconds": {str(share): -seconds for share, seconds in resume.items()},
        "index_bytes_per_document": index,
    }
    report(f"reading {total / 1e6:,.1f}M tokens in rows of {ROW_TOKENS}", ["", "Mtokens/s", "ours is x"], rows, figures)


if __name__ == "__main__":
    main()
