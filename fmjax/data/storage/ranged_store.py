"""Token stores in buckets: tokens are read by range; the ends of documents, 8 bytes for each, and
their sizes where they are needed, are copied into the cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import fsspec
import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.storage import cache
from fmjax.data.storage.fingerprints import same_content
from fmjax.data.storage.ranged import RangedFile, ranged
from fmjax.data.storage.remote import explained
from fmjax.data.storage.token_store import ENDS, FORMAT, HEADER, SIZES, TOKENS, TokenStore, mapped

PREFIX = "tokens-"  # of the names of stores


class RangedTokenStore(TokenStore):
    """A finished store at an address, pickled by its files as they were when it was found."""

    def __init__(self, header: Record, files: dict[str, RangedFile]):
        self.header, self.files = header, files
        self.dtype = np.dtype(header["dtype"])

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Value, ...]]:
        return RangedTokenStore, (self.header, self.files)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        return mapped(self.files[ENDS].copy(), np.dtype("<i8"))

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        return mapped(self.files[SIZES].copy(), np.dtype("<i8")).reshape(-1, 2)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns the tokens from `begin` to before `end`, int32. Raises UserError if they cannot
        be read, or have changed."""
        wide = self.dtype.itemsize
        data = self.files[TOKENS].read(begin * wide, end * wide)
        return np.frombuffer(data, self.dtype).astype(np.int32)


def find(address: str, accepts: Callable[[str, Record], bool]) -> RangedTokenStore | None:
    """Returns the first complete store in a folder whose name and header are accepted, or None.

    Raises UserError if the folder cannot be read."""
    with explained(address):
        system, path = fsspec.core.url_to_fs(address)
        try:
            system.invalidate_cache(path)
            there = system.ls(path, detail=False)
        except FileNotFoundError:
            return None
        for name in sorted(one.rstrip("/").rpartition("/")[2] for one in there):
            if name.startswith(PREFIX) and (store := opened(f"{address}/{name}", name, accepts)):
                return store
    return None


def opened(
    address: str, name: str, accepts: Callable[[str, Record], bool]
) -> RangedTokenStore | None:
    """Returns the store at an address; None unless it is complete and accepted, and with
    `data.verify` its digests are those of its files."""
    system, path = fsspec.core.url_to_fs(address)
    try:
        header: Record = json.loads(system.cat_file(f"{path}/{HEADER}"))
        if header["format"] != FORMAT or not accepts(name, header):
            return None
        files = {
            own: ranged(system, f"{path}/{own}", f"{address}/{own}") for own in header["files"]
        }
        for own, about in header["files"].items():
            if files[own].size != about["size"] or (
                cache.is_verifying() and files[own].fingerprint()["sha256"] != about["sha256"]
            ):
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return RangedTokenStore(header, files)


def holds(header: Record, column: str, tokenizer: str, files: Sequence[Record]) -> bool:
    """Returns whether a store beside shards, as `scripts/prepare_data.py` writes it, has the tokens
    of these files, which are known by what the bucket says about them."""
    shards = header.get("shards", [])
    return (
        header.get("column") == column
        and header.get("tokenizer") == tokenizer
        and len(shards) == len(files)
        and all(same_content(one, other) for one, other in zip(shards, files, strict=True))
    )
