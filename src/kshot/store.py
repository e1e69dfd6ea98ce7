"""Rows of tensors by key, kept on disk for later runs: what was encoded or decoded once is read from then on.

A row belongs to a kind (features, images), to a context that says by what it was computed, and to a key that says of
what. Files lie in ``cache_folder()/store/KIND/DIGEST OF THE CONTEXT``; each holds some keys and their rows, carries a
digest of itself, is written beside and renamed, and never changes. So processes may write and read at one moment: what
two of them write twice is there twice, and a file that one deletes while another reads it stays until it is let go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from kshot.errors import UserError, first_line
from kshot.files import amount, cache_folder, make_folder, write_atomically
from kshot.sealing import check_seal, save_sealed

FORMAT = 1  # of the files, and of what rows mean: another one where code changes what it computes
SMALL, MANY = 8_000_000, 32  # bytes of a small file, and how many of a context are joined to one
USED = 60  # seconds after which a file that is used again is noted as such
ABANDONED = 3600  # seconds after which what a killed process was writing is deleted

logger = logging.getLogger("kshot")
_refused: set[str] = set()  # kinds of which this process has said that they cannot be kept


class Store:
    """Rows of one shape and type by key.

    Args:
        kind: what the rows are: the folder above all contexts of it.
        context: all that decides a row beside its key, in plain data. It is kept in each file as text.
        most: bytes that all stores together may take; the files used longest ago are deleted first. 0 keeps nothing.
    """

    def __init__(self, kind: str, context: Mapping[str, Any], most: int) -> None:
        self.kind, self.most = kind, most
        self.context = json.dumps({"format": FORMAT, **context}, sort_keys=True)
        root = root_folder()
        self.folder = root and root / kind / hashlib.sha256(self.context.encode()).hexdigest()[:16]

    def find(self, keys: Sequence[str]) -> list[Tensor | None]:
        """Looks rows up by keys of 16 hexadecimal digits: memory-mapped, and None for a key that is not there.

        A file whose content is not that of its digest is named in one line and deleted.
        """
        if self.folder is None or not self.most:
            return [None] * len(keys)
        wanted = [int(key, 16) if key else -1 for key in keys]
        sought = np.array([key for key in wanted if key >= 0], np.uint64)
        rows: dict[int, Tensor] = {}
        for _ in range(2):  # once more when a file has gone meanwhile: its rows may be in one that joins several
            gone = False
            for file in _files(self.folder):
                found = self._found(file, sought)
                gone |= found is None
                rows |= found or {}
            if not gone:
                break
        return [rows.get(key) for key in wanted]

    def write(self, keys: Sequence[str], rows: Tensor) -> bool:
        """Keeps rows, (N, ...), by their keys, but for empty keys; False, after one line, where that cannot be."""
        there = [i for i, key in enumerate(keys) if key]
        if self.folder is None or not self.most or not there:
            return False
        if rows[0].nbytes * len(there) > self.most:
            return self._refused(f"{amount(rows[0].nbytes * len(there))} are more than all may take")
        try:
            self._write(np.array([int(keys[i], 16) for i in there], np.uint64), rows[there])
            self._join()
        except UserError as error:
            return self._refused(str(error))
        trim(self.most)
        return True

    def _found(self, file: Path, sought: np.ndarray) -> dict[int, Tensor] | None:
        """What a file holds of some keys; None where it has gone."""
        if not os.access(file, os.R_OK) and file.exists():  # another user's
            return {}
        try:
            entry = file.stat()
            keys, order, rows = _opened(str(file), entry.st_ino, entry.st_size, self.context)
            near = np.searchsorted(keys, sought).clip(max=len(keys) - 1)
            there = np.flatnonzero(keys[near] == sought) if len(keys) else ()
            if not len(there):
                return {}
            _check(str(file), entry.st_ino, entry.st_size)
        except FileNotFoundError:
            return None
        except Exception as error:  # a broken file may raise anything in a reader
            logger.info("store: %s is damaged (%s): it is deleted, and made anew.", file, first_line(error))
            with suppress(OSError):
                file.unlink()
            return {}
        if time.time() - entry.st_mtime > USED:
            with suppress(OSError):
                os.utime(file)
        return {int(sought[i]): rows[order[near[i]]] for i in there}

    def _write(self, keys: np.ndarray, rows: Tensor) -> None:
        assert self.folder is not None
        tensors = {"keys": torch.from_numpy(keys.view(np.int64)), "rows": rows.contiguous()}
        file = make_folder(self.folder) / f"{secrets.token_hex(8)}.safetensors"
        write_atomically(file, partial(save_sealed, tensors, metadata={"context": self.context}))

    def _join(self) -> None:
        assert self.folder is not None
        small = []
        for file in _files(self.folder):
            with suppress(OSError):
                if file.stat().st_size < SMALL:
                    small.append(file)
        if len(small) <= MANY:
            return
        rows: dict[int, Tensor] = {}
        for file in small:
            with suppress(Exception):  # found to be damaged, and said, when it is looked into
                entry = file.stat()
                keys, order, values = _opened(str(file), entry.st_ino, entry.st_size, self.context)
                _check(str(file), entry.st_ino, entry.st_size)
                rows |= {key: values[place] for key, place in zip(keys.tolist(), order.tolist(), strict=True)}
        if rows:
            self._write(np.array(list(rows), np.uint64), torch.stack(list(rows.values())))
        for file in small:
            with suppress(OSError):
                file.unlink()

    def _refused(self, why: str) -> bool:
        if self.kind not in _refused:
            _refused.add(self.kind)
            logger.info("store: %s are not kept for later runs: %s", self.kind, why)
        return False


@lru_cache(maxsize=4096)
def _opened(file: str, inode: int, size: int, context: str) -> tuple[np.ndarray, np.ndarray, Tensor]:  # noqa: ARG001  tell files apart
    """Its keys in their order, the place of each, and the rows."""
    with safe_open(file, framework="pt") as content:
        if content.metadata()["context"] != context:
            raise ValueError("of another context than its folder's")
        keys, rows = content.get_tensor("keys"), content.get_tensor("rows")
    if keys.dtype != torch.int64 or keys.shape != rows.shape[:1]:
        raise ValueError("as many keys as rows are needed")
    named = keys.numpy().view(np.uint64)
    order = named.argsort()
    return named[order], order, rows


@lru_cache(maxsize=4096)
def _check(file: str, inode: int, size: int) -> None:  # noqa: ARG001  tell files apart
    if not check_seal(Path(file)):
        raise ValueError("it has no digest")


def root_folder() -> Path | None:
    """Where all stores lie; None where KSHOT_CACHE is empty, or the user has no home folder."""
    if os.environ.get("KSHOT_CACHE") == "":
        return None
    with suppress(RuntimeError):
        return cache_folder() / "store"
    return None


def _files(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.glob("[!.]*.safetensors"))
    return []


def _entries(pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    root = root_folder()
    with suppress(OSError):
        for file in root.glob(pattern) if root else ():
            with suppress(OSError):
                yield file, file.stat()


def trim(most: int) -> None:
    """Deletes the files used longest ago until all take at most ``most`` bytes, and what killed processes left."""
    for file, entry in _entries("*/*/.*.partial"):
        if time.time() - entry.st_mtime > ABANDONED:
            with suppress(OSError):
                file.unlink()
    files = sorted(_entries("*/*/[!.]*.safetensors"), key=lambda each: each[1].st_mtime)
    total, freed = sum(entry.st_size for _, entry in files), 0
    for file, entry in files:
        if total - freed <= most:
            break
        with suppress(OSError):
            file.unlink()
            freed += entry.st_size
    if freed:
        _opened.cache_clear()  # a file that is mapped takes its room until it is let go
        logger.info("store: %s used longest ago are deleted, to stay below %s.", amount(freed), amount(most))


def contents() -> list[dict[str, Any]]:
    """What is kept, by context: kind, context, numbers of files and rows, bytes, and when it was used last."""
    found: dict[Path, dict[str, Any]] = {}
    for file, entry in _entries("*/*/[!.]*.safetensors"):
        with suppress(Exception), safe_open(file, framework="pt") as content:
            said = {"kind": file.parts[-3], "folder": file.parent.name, "context": content.metadata()["context"]}
            row = found.setdefault(file.parent, {**said, "files": 0, "rows": 0, "bytes": 0, "used": 0.0})
            row["files"] += 1
            row["rows"] += content.get_slice("keys").get_shape()[0]
            row["bytes"] += entry.st_size
            row["used"] = max(row["used"], entry.st_mtime)
    return list(found.values())


def clear() -> int:
    """Deletes all that is kept; the bytes that this frees."""
    freed = 0
    for pattern in ("*/*/[!.]*.safetensors", "*/*/.*.partial"):
        for file, entry in _entries(pattern):
            with suppress(OSError):
                file.unlink()
                freed += entry.st_size
    root = root_folder()
    for folder in sorted(root.glob("**/"), reverse=True) if root else ():
        with suppress(OSError):  # one that another process writes into stays
            folder.rmdir()
    return freed
