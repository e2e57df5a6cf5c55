"""Shards that lie elsewhere: fetched once into a folder of this machine, checked, and read from there like local ones.

The order of a run visits all shards within its first steps, so streaming them would read every one of them for a
few of its documents; a copy on the local disk costs one pass over the network, and keeps order, resume and speed what
they are for local shards. A place is `https://host/folder`, `s3://bucket/folder`, or `pipe:command` with `{}` where
the name of a file belongs (`pipe:ssh host cat shards/{}`). All three are read through webdataset's pipes.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatext.data import DataError
from megatext.data.shards import MANIFEST
from megatext.data.tar_index import cache_root, locked

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0
"""Doubles after every failed attempt: 31 seconds in all."""
_PARALLEL = 8
_BLOCK_BYTES = 1 << 20
_COMMANDS = {
    # a transfer that stands still for a minute is given up
    "http": "curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1 --speed-time 60 {}",
    "s3": "aws s3 cp --only-show-errors {} -",
}


def is_remote(place: str) -> bool:
    """Whether it is not a path of this machine."""
    return re.match(r"https?://|s3://|pipe:", place) is not None


@functools.cache
def local_folder(place: str) -> Path:
    """The folder in which the shard directory `place` can be read: itself, or, for a remote one, a copy that holds its
    manifest and its tokenizer, and later what `fetch` puts there. Every version of a remote manifest has a copy of its
    own, so what lies there is never out of date. Raises DataError."""
    if not is_remote(place):
        return Path(place)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        _fetch_file(place, MANIFEST, root)
        content = (root / MANIFEST).read_bytes()
        manifest = json.loads(content)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", place).strip("-")[-60:]
        folder = root / f"{name}-{hashlib.sha256(place.encode() + content).hexdigest()[:12]}"
        folder.mkdir(exist_ok=True)
        os.replace(root / MANIFEST, folder / MANIFEST)
    fetch(place, manifest.get("tokenizer", {}).get("files", []), folder)  # teacher states have no tokenizer
    return folder


def fetch(place: str, entries: Iterable[dict[str, Any]], folder: Path) -> None:
    """Copy the files of these manifest entries (`file`, `bytes`, `sha256`) into the folder that `local_folder` gave,
    several at a time; nothing happens for a local place. Of the processes of a machine one copies, the others wait.
    Raises DataError for what cannot be fetched, or is not what the manifest says."""
    if not is_remote(place):
        return
    with locked(folder):
        # a copy appears by rename when its checksum was right
        missing = [entry for entry in entries if not _has_size(folder / entry["file"], entry["bytes"])]
        if not missing:
            return
        size, free = sum(entry["bytes"] for entry in missing), shutil.disk_usage(folder).free
        if size > free:
            raise DataError(
                f"{place}: {size / 1e9:,.1f} GB are to be fetched, but {folder} has room for {free / 1e9:,.1f} GB; set "
                "MEGATEXT_CACHE to a folder on a larger disk"
            )
        bar = tqdm(total=size, desc=f"fetch {place}", unit="B", unit_scale=True, dynamic_ncols=True)
        with bar, ThreadPoolExecutor(_PARALLEL) as pool:
            copies = [pool.submit(_fetch_file, place, e["file"], folder, e["sha256"]) for e in missing]
            try:
                for copy, entry in zip(copies, missing, strict=True):
                    copy.result()
                    bar.update(entry["bytes"])
            finally:
                pool.shutdown(cancel_futures=True)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetch_file(place: str, name: str, folder: Path, sha256: str | None = None) -> None:
    """A file of the place, whole and checked, or DataError after some attempts."""
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    wait, reason = FIRST_WAIT_SECONDS, ""
    for attempt in range(ATTEMPTS):
        if attempt:
            tqdm.write(f"{place}: {name}: {reason}; attempt {attempt + 1} in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
            wait *= 2
        try:
            found = _copy(_pipe(place, name), partial)
        except OSError as error:
            status = re.search(r"exit (-?\d+) \(read\)", str(error))
            reason = f"the transfer ended with status {status.group(1)}" if status else str(error)
            if status and status.group(1) == "127":
                program = _pipe(place, name).removeprefix("pipe:").split()[0]
                raise DataError(
                    f"{place}: the program that reads such places, {program}, is not installed here"
                ) from error
            continue
        if sha256 is None and not _is_manifest(partial):
            reason = "what came is not the manifest of shards"
        elif sha256 not in (None, found):
            reason = f"its sha256 is {found}, the manifest says {sha256}"
        else:
            os.replace(partial, target)
            return
    partial.unlink(missing_ok=True)
    raise DataError(f"{place}: {name} could not be fetched in {ATTEMPTS} attempts: {reason}")


def _is_manifest(path: Path) -> bool:
    try:
        return "splits" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        return False


def _pipe(place: str, name: str) -> str:
    """webdataset's address of a file."""
    if place.startswith("pipe:"):
        if "{}" not in place:
            raise DataError(f"{place}: a pipe command needs {{}} where the name of the file belongs")
        return place.replace("{}", shlex.quote(name))
    scheme = "s3" if place.startswith("s3:") else "http"
    return "pipe:" + _COMMANDS[scheme].format(shlex.quote(f"{place.rstrip('/')}/{name}"))


def _copy(url: str, target: Path) -> str:
    """Copy what a pipe gives into a file; its sha256. Raises OSError where the command failed."""
    from webdataset.gopen import gopen

    digest = hashlib.sha256()
    stream = gopen(url)
    try:
        with open(target, "wb") as file:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                file.write(block)
        stream.close()
        if stream.proc.returncode:  # which webdataset does not raise while GOPEN_VERBOSE is set
            raise OSError(f"exit {stream.proc.returncode} (read)")
    except BaseException as error:
        with suppress(OSError):  # of the command, which was cut short
            stream.close()
        if isinstance(error, OSError) and error.errno is not None:
            target.unlink(missing_ok=True)
            raise DataError(f"{target}: cannot be written ({error.strerror})") from error
        raise
    return digest.hexdigest()
