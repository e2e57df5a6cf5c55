"""Look into a shard directory: `python -m data_tools.inspect_shards DIR [--verify] [--show K]`."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatext.config import cli_errors
from megatext.data import DataError
from megatext.data.shards import TOKENIZER_FOLDER, read_manifest
from megatext.data.tar_index import TarIndex
from megatext.tokenizer import load_tokenizer


def verify(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the shards, one line each: size, checksum, counts, ids beyond the vocabulary, missing eos."""
    problems = []
    eos, vocab_size = manifest["tokenizer"]["eos_id"], manifest["tokenizer"]["vocab_size"]
    if load_tokenizer(directory / TOKENIZER_FOLDER).fingerprint() != manifest["tokenizer"]["fingerprint"]:
        problems.append(f"{directory / TOKENIZER_FOLDER}: is not the tokenizer the shards were made with")
    for entry in (entry for split in manifest["splits"].values() for entry in split["shards"]):
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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect_shards", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--verify", action="store_true", help="read everything and compare it with the manifest")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="print the text of K documents of every split")
    options = parser.parse_args(argv)
    directory = Path(options.directory)
    with cli_errors():
        manifest = read_manifest(directory)
        tokenizer = manifest["tokenizer"]
        short = tokenizer["fingerprint"][:16]
        print(f"tokenizer: {tokenizer['vocab_size']} entries, eos {tokenizer['eos_id']}, fingerprint {short}")
        for kind in ("dropped", "skipped"):
            found = ", ".join(f"{count:,} {reason}" for reason, count in manifest.get(kind, {}).items())
            print(f"{kind}:   {found or 'nothing'}")
        for split, content in manifest["splits"].items():
            shards = [TarIndex(directory / entry["file"]) for entry in content["shards"]]
            lengths = np.concatenate([shard.lengths for shard in shards]) if shards else np.zeros(1, np.int64)
            marks = " ".join(f"{int(value):,}" for value in np.percentile(lengths, [0, 10, 50, 90, 100]))
            print(
                f"{split:>10}: {content['documents']:,} documents, {content['tokens']:,} tokens, {len(shards)} shards; "
                f"tokens a document (min, 10 %, median, 90 %, max): {marks}"
            )
            for shard in shards[:1]:
                for document in range(min(options.show, len(shard))):
                    record = json.loads(shard.json(document) or b"{}")
                    text = load_tokenizer(directory / TOKENIZER_FOLDER).decode(shard.array(document).tolist())
                    print(f"--- {shard.key(document)} {record.get('title') or record.get('url') or ''}\n{text}")
        if options.verify:
            problems = verify(directory, manifest)
            if problems:
                more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
                raise DataError("\n".join(problems[:20] + more))
            print("verified: checksums, counts, ids and ends of documents agree with the manifest")


if __name__ == "__main__":
    main()
