"""``manifest.json`` of a state store: what it is valid for, which shards are whole, and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tea_rl
from tea_rl.errors import TeaError
from tea_rl.training.files import atomic_write_text

MANIFEST_NAME = "manifest.json"
REFERENCE_NAME = "reference.safetensors"
LOCK_NAME = "store.lock"
FORMAT_VERSION = 1


@dataclass
class StoreHeader:
    """What a store holds and what that depends on; all of it JSON values.

    Attributes:
        kind: ``dataset`` (labelled texts) or ``rollout`` (sampled completions).
        keys: see `tea_rl.states.keys`.
        source: digest of the rows and settings it is made from; a killed writer continues only the same.
        width: numbers in a state, ``D * (1 + num_means)``.
        hidden_size: ``D``.
        vocab_size: ``V``.
        shortlist_size: ``k``.
        temperature: at which shortlists and log-probabilities are defined.
        logit_scale: of the backbone.
        base_settings: how the backbone was loaded; heads made from the store remember it.
    """

    kind: str
    keys: dict[str, Any]
    source: str
    width: int
    hidden_size: int
    vocab_size: int
    shortlist_size: int
    temperature: float
    logit_scale: float
    base_settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Manifest:
    """The whole of ``manifest.json``.

    Attributes:
        header: what the store is valid for.
        shards: ``{name, rows, tokens, files: {file: {bytes, sha256}}}`` of every whole shard, in order.
        files: ``{file: {bytes, sha256}}`` of the files beside them: reference weight, and rewards once complete.
        rewards: name of the file with the rewards in force; None until complete.
        complete: whether every row is there.
        notes: counts for people: rows cut or dropped.
    """

    header: StoreHeader
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewards: str | None = None
    complete: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of all whole shards."""
        return sum(shard["rows"] for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it, atomically and durably.

        Raises:
            OSError: the disk's own error; the old manifest stays.
        """
        value = {"format_version": FORMAT_VERSION, "tea_rl_version": tea_rl.__version__, **asdict(self)}
        value.update(value.pop("header"))
        atomic_write_text(folder / MANIFEST_NAME, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            TeaError: if there is no store in the folder, or one that this version cannot read.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            what = "there is no such folder" if not folder.exists() else f"it has no {MANIFEST_NAME}"
            raise TeaError(
                f"expected a state store in {folder}, but {what}; make one with tea-rl embed or tea-rl rollout"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"format version {value.get('format_version')}, this version reads {FORMAT_VERSION}"
                )
            header = StoreHeader(**{item.name: value[item.name] for item in fields(StoreHeader)})
            rest = {item.name: value[item.name] for item in fields(cls) if item.name != "header"}
            manifest = cls(header, **rest)
            for shard in manifest.shards:
                _ = shard["name"], shard["rows"] + 0, shard["tokens"] + 0, shard["files"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TeaError(
                f"{path} is not the manifest of a state store ({reason}); make the store again"
            ) from error
        return manifest

    def damage(self, folder: Path, digests: bool = True) -> Iterator[tuple[str, str]]:
        """Yield ``(name, what is wrong)`` of every damaged part; ``digests`` off compares sizes only.

        The name is a shard's, or that of a file beside the shards.
        """
        listed = [(name, {name: entry}) for name, entry in self.files.items()]
        listed += [(shard["name"], shard["files"]) for shard in self.shards]
        for name, entries in listed:
            for file, entry in entries.items():
                wrong = _file_damage(folder / file, entry, digests)
                if wrong is not None:
                    yield name, wrong
                    break


def _file_damage(path: Path, entry: dict[str, Any], digests: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path.name} has {size} bytes instead of {entry['bytes']}"
    if digests and file_digest(path) != entry["sha256"]:
        return f"{path.name} does not have the digest it was written with"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """``{bytes, sha256}`` of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
