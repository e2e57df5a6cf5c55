"""Look into a shard directory: `python -m data_tools.inspect_shards DIR [--histogram PNG] [--show K] [--verify]`."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.shards import TOKENIZER_FOLDER, read_manifest
from megatext.data.tar_index import TarIndex
from megatext.tokenizer import load_tokenizer

_PERCENTILES = {"min": 0, "10 %": 10, "median": 50, "90 %": 90, "max": 100}


def verify(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the shards, one line each: size, checksum, counts, ids beyond the vocabulary, missing eos."""
    problems = []
    eos, vocab_size = manifest["tokenizer"]["eos_id"], manifest["tokenizer"]["vocab_size"]
    if load_tokenizer(directory / TOKENIZER_FOLDER).fingerprint() != manifest["tokenizer"]["fingerprint"]:
        problems.append(f"{directory / TOKENIZER_FOLDER}: is not the tokenizer the shards were made with")
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    for entry in tqdm(entries, desc="verify", unit="shard", dynamic_ncols=True):
        path = directory / entry["file"]
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            shard = TarIndex(path)
        except FileNotFoundError:
            problems.append(f"{path}: missing")
            continue
        except DataError as error:
            problems.append(str(error))
            continue
        if digest != entry["sha256"]:
            problems.append(f"{path}: sha256 {digest}, the manifest says {entry['sha256']}")
        if len(shard) != entry["samples"] or int(shard.lengths.sum()) != entry["tokens"]:
            found = f"{len(shard)} samples, {int(shard.lengths.sum())} tokens"
            problems.append(f"{path}: {found}; the manifest says {entry['samples']} and {entry['tokens']}")
        for document in range(len(shard)):
            tokens = shard.array(document)
            if len(tokens) == 0 or tokens[-1] != eos or int(tokens.max()) >= vocab_size:
                key = shard.key(document)
                problems.append(f"{path}: sample {key}: empty, no end of document, or ids beyond the vocabulary")
    return problems


def print_statistics(directory: Path, manifest: dict[str, Any], lengths: dict[str, np.ndarray]) -> None:
    """The tokenizer, what was left out, and a line a split."""
    tokenizer = manifest["tokenizer"]
    print(
        f"{directory}: {sum(len(part) for part in lengths.values()):,} documents of {len(manifest['sources'])} inputs"
    )
    print(
        f"tokenizer: {tokenizer['vocab_size']:,} entries, eos {tokenizer['eos_id']}, "
        f"fingerprint {tokenizer['fingerprint'][:16]}"
    )
    for kind in ("dropped", "skipped"):
        found = ", ".join(f"{count:,} {reason}" for reason, count in manifest.get(kind, {}).items())
        print(f"{kind + ':':<10} {found or 'nothing'}")
    print(f"\n{'':<10} {'documents':>12} {'tokens':>15} {'GB':>9} {'shards':>6}   tokens a document:", end="")
    print("".join(f" {name:>8}" for name in [*_PERCENTILES, "mean"]))
    for split, content in manifest["splits"].items():
        size = sum(entry["bytes"] for entry in content["shards"]) / 1e9
        marks = [*np.percentile(lengths[split], list(_PERCENTILES.values())), lengths[split].mean()] if size else []
        counts = f"{content['documents']:>12,} {content['tokens']:>15,} {size:>9,.3f} {len(content['shards']):>6}"
        print(f"{split:<10} {counts}{'':21}" + "".join(f" {value:>8,.0f}" for value in marks))


def plot_lengths(path: Path, lengths: dict[str, np.ndarray], title: str) -> None:
    """How documents, and tokens, spread over lengths of documents, as a PNG: the second says what windows will cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    everything = np.concatenate(list(lengths.values()))
    edges = np.geomspace(max(1, everything.min()), everything.max() + 1, 50)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, weights, what in ((panels[0], None, "documents"), (panels[1], everything, "tokens")):
        panel.hist(everything, edges, weights=weights, color="#4878a8")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        panel.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        panel.set(xlabel="tokens in the document", ylabel=what, title=f"{what} by length of document")
        for quantile, style in ((0.5, "-"), (0.9, "--")):
            order = np.sort(everything)
            at = order[int(quantile * (len(order) - 1))]
            if weights is not None:
                at = order[np.searchsorted(np.cumsum(order), quantile * order.sum())]
            panel.axvline(at, color="black", linewidth=0.8, linestyle=style, label=f"{quantile:.0%} up to {at:,}")
        panel.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def show_documents(directory: Path, manifest: dict[str, Any], count: int) -> None:
    """The text of some documents of every split, spread over its first shard."""
    tokenizer = load_tokenizer(directory / TOKENIZER_FOLDER)
    for split, content in manifest["splits"].items():
        for entry in content["shards"][:1]:
            shard = TarIndex(directory / entry["file"])
            for document in np.unique(np.linspace(0, len(shard) - 1, min(count, len(shard))).astype(int)).tolist():
                record = json.loads(shard.json(document) or b"{}")
                about = record.get("title") or record.get("url") or ""
                print(f"\n--- {split}: {shard.key(document)}, {shard.lengths[document]:,} tokens. {about}")
                print(tokenizer.decode(shard.array(document).tolist()))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect_shards", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--histogram", metavar="PNG", help="plot how long the documents are")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="print the text of K documents of every split")
    parser.add_argument("--verify", action="store_true", help="read everything and compare it with the manifest")
    options = parser.parse_args(argv)
    directory = Path(options.directory)
    with cli_errors():
        manifest = read_manifest(directory)
        if options.verify:
            problems = verify(directory, manifest)
            if problems:
                more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
                raise DataError("\n".join(problems[:20] + more))
            print("verified: checksums, counts, ids and ends of documents agree with the manifest")
        lengths = {}
        for split, content in manifest["splits"].items():
            entries = content["shards"]
            parts = [TarIndex(directory / entry["file"], sha256=entry["sha256"]).lengths for entry in entries]
            lengths[split] = np.concatenate([np.empty(0, np.int64), *parts])
        print_statistics(directory, manifest, lengths)
        if options.histogram:
            plot_lengths(Path(options.histogram), lengths, str(directory))
            print(f"\nhistogram: {options.histogram}")
        if options.show:
            show_documents(directory, manifest, options.show)


if __name__ == "__main__":
    main()
