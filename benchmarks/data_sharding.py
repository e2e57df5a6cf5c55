"""Sharding against the tokenizer alone: `python benchmarks/data_sharding.py --input FILE... --tokenizer T`.

Throughput of `data_tools.shard`, and of the same tokenizer's own batch encoding of the same texts, loaded already, by
the same number of cores (`tokenizers`' encode_batch_fast, or SentencePiece with as many threads). Sharding is given as
a whole and without its start-up, which is the time that the same command takes for one document. Then the memory of
all of sharding's processes over 1, 4 and 16 times the text.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from common import best_of, report

from data_tools import sources


def read_texts(inputs: list[str], megabytes: float) -> list[str]:
    """Texts of the inputs, over and over with a number before them (or they would be duplicates), of so many MB."""
    texts = [document.text for chunk in sources.read(inputs) for document in sources.decode(chunk)[0]]
    found: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        number = len(found)
        found.append(texts[number % len(texts)] if number < len(texts) else f"{number} {texts[number % len(texts)]}")
        size += len(found[-1].encode())
    return found


def write_input(path: Path, texts: list[str]) -> None:
    """As .jsonl.gz, so that reading costs what it usually costs."""
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def tokens_of(folder: Path) -> int:
    """Tokens in a shard directory."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return sum(split["tokens"] for split in manifest["splits"].values())


def shard_command(source: Path, tokenizer: str, output: Path, workers: int) -> list[str]:
    arguments = ["--input", str(source), "--tokenizer", tokenizer, "--output", str(output), "--workers", str(workers)]
    return [sys.executable, "-m", "data_tools.shard", *arguments]


def raw_encoding(texts: list[str], tokenizer: str, threads: int) -> float:
    """Tokens/s of the tokenizer's own library with `threads` threads, in a process of its own, loading not counted."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(texts, file)
        file.flush()
        program = [sys.executable, __file__, "--raw", file.name, "--tokenizer", tokenizer, "--workers", str(threads)]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        out = subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def encode_raw(path: str, tokenizer: str, threads: int) -> None:
    """What `raw_encoding` runs."""
    texts = json.loads(Path(path).read_text())
    tokens = 0
    if (Path(tokenizer) / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(Path(tokenizer) / "tokenizer.model"))
        start = time.perf_counter()
        for first in range(0, len(texts), 512):
            tokens += sum(map(len, processor.encode(texts[first : first + 512], num_threads=threads)))
    else:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
        start = time.perf_counter()
        for first in range(0, len(texts), 512):
            batch = backend.encode_batch_fast(texts[first : first + 512], add_special_tokens=False)
            tokens += sum(len(encoding.ids) for encoding in batch)
    print(tokens / (time.perf_counter() - start))


def peak_memory(command: list[str]) -> int:
    """Bytes that all processes of a command held at most (proportional set size, so shared pages count once)."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            held = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    held += one.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            peak = max(peak, held)
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait() != 0:
        raise SystemExit(f"error: {' '.join(command)} failed")
    watcher.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", help="texts, in any form that data_tools.shard reads")
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-1.7B", help="folder or name (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--megabytes", type=float, default=40, help="text for the throughput (%(default)s)")
    parser.add_argument(
        "--memory-megabytes", type=float, default=10, help="text of the curve's first point (%(default)s)"
    )
    parser.add_argument("--memory-tokenizer", help="for the curve: a faster one; default as --tokenizer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.raw:
        encode_raw(options.raw, options.tokenizer, options.workers)
        return
    if not options.input:
        parser.error("--input is needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = read_texts(options.input, options.megabytes)
        write_input(folder / "text.jsonl.gz", texts)
        write_input(folder / "one.jsonl.gz", texts[:1])
        runs = iter(range(1000))

        def seconds(source: str) -> float:
            output = folder / f"shards-{next(runs)}"
            start = time.perf_counter()
            command = shard_command(folder / source, options.tokenizer, output, options.workers)
            subprocess.run(command, check=True, capture_output=True)
            found[source] = tokens_of(output)
            return time.perf_counter() - start

        found: dict[str, int] = {}
        best = best_of(
            {
                "tokenizer alone": lambda: raw_encoding(texts, options.tokenizer, options.workers),
                "all": lambda: -seconds("text.jsonl.gz"),
                "start-up": lambda: -seconds("one.jsonl.gz"),
            },
            options.repeats,
        )
        tokens = found["text.jsonl.gz"]
        rates = {
            "tokenizer alone": best["tokenizer alone"],
            "data_tools.shard, whole": tokens / -best["all"],
            "data_tools.shard after start-up": tokens / (best["start-up"] - best["all"]),
        }
        curve = {}
        for factor in (1, 4, 16):
            write_input(folder / "part.jsonl.gz", read_texts(options.input, factor * options.memory_megabytes))
            tokenizer = options.memory_tokenizer or options.tokenizer
            output = folder / f"memory-{factor}"
            curve[factor] = peak_memory(shard_command(folder / "part.jsonl.gz", tokenizer, output, options.workers))
    share = rates["data_tools.shard after start-up"] / rates["tokenizer alone"]
    rows = [[name, f"{rate / 1e3:,.0f}", f"{rate / rates['tokenizer alone']:.0%}"] for name, rate in rates.items()]
    rows += [[f"memory, {factor}x", f"{peak / 2**20:,.0f} MiB", ""] for factor, peak in curve.items()]
    report(
        f"sharding {options.megabytes:g} MB, {options.workers} workers; memory from {options.memory_megabytes:g} MB on",
        ["", "ktokens/s", "share"],
        rows,
        {
            "tokens_per_second": rates,
            "share_of_tokenizer": share,
            "start_up_seconds": -best["start-up"],
            "peak_memory_bytes": curve,
        },
    )


if __name__ == "__main__":
    main()
