"""``manifest.json`` of a state store: what it is valid for, which shards are whole, and their digests."""

from __future__ import annotations

import hashlib
import json
import re
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
#: Folder inside a store with the states of the recipe's ``anchor.dataset``: a store of its own.
ANCHOR_NAME = "anchor"
FORMAT_VERSION = 2


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
        shards: ``{name, rows, tokens, rows_sha256, files: {file: {bytes, sha256}}}`` of every whole shard, in order.
        parts: the same of the pieces of the shard to come that a writer has saved so far; none in a complete store.
        files: ``{file: {bytes, sha256}}`` of the files beside them: reference weight, and rewards once complete.
        rewards: name of the file with the rewards in force; None until complete.
        relabelled: ``NAME=WEIGHT`` of the reward functions that gave them; None for those the rows were written with.
        complete: whether every row is there.
        final_rows: rows of the complete store, remembered while a writer mends it; None until it was complete once.
        notes: counts for people: rows cut or dropped.
    """

    header: StoreHeader
    shards: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewards: str | None = None
    relabelled: list[str] | None = None
    complete: bool = False
    final_rows: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows on disk: those of all whole shards and of the saved parts of the next."""
        return sum(item["rows"] for item in (*self.shards, *self.parts))

    def entries(self) -> dict[str, dict[str, Any]]:
        """``{bytes, sha256}`` of every file of the store, by name."""
        entries = dict(self.files)
        for item in (*self.shards, *self.parts):
            entries.update(item["files"])
        return entries

    def write(self, folder: Path) -> None:
        """Write it, atomically and durably.

        Raises:
            OSError: the disk's own error; the old manifest stays.
        """
        value = {"format_version": FORMAT_VERSION, "tea_rl_version": tea_rl.__version__, **asdict(self)}
        value.update(value.pop("header"))
        value["sha256"] = _own_digest(value)
        atomic_write_text(folder / MANIFEST_NAME, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            TeaError: if there is no store in the folder, or its manifest is damaged or of another version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            what = "there is no such folder" if not folder.exists() else f"it has no {MANIFEST_NAME}"
            raise TeaError(
                f"expected a state store in {folder}, but {what}; make one with tea-rl embed or tea-rl rollout"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            version = value.get("format_version")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise _damaged_manifest(path, error) from error
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise TeaError(
                f"the store {folder} has format version {version} (of tea-rl {value.get('tea_rl_version')}), but this tea-rl "
                f"reads {FORMAT_VERSION}; run tea-rl embed or tea-rl rollout with another --output"
            )
        try:
            return cls._parse(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged_manifest(path, error) from error

    @classmethod
    def _parse(cls, value: dict[str, Any]) -> Manifest:
        if value.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format version is {value.get('format_version')!r}")
        if value.get("sha256") != _own_digest(value):
            raise ValueError("it does not have the digest it was written with")
        header = StoreHeader(**{item.name: value[item.name] for item in fields(StoreHeader)})
        manifest = cls(
            header, **{item.name: value[item.name] for item in fields(cls) if item.name != "header"}
        )
        manifest._check_structure()
        return manifest

    def _check_structure(self) -> None:
        """Refuse what nobody but a program that is not this one has written, so that nothing later meets it.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: if the values are not what the attributes say.
        """
        entries = dict(self.files)
        for kind, items in (("shard", self.shards), ("part", self.parts)):
            for item in items:
                name, files = item["name"], item["files"]
                if not re.fullmatch(rf"{kind}-[0-9-]+", name) or set(files) != {
                    f"{name}.safetensors",
                    f"{name}.jsonl",
                }:
                    raise ValueError(f"{name} is no {kind}")
                if type(item["rows"]) is not int or type(item["tokens"]) is not int or item["rows"] < 1:
                    raise ValueError(f"{name} has {item['rows']} rows and {item['tokens']} tokens")
                _ = item["rows_sha256"]
                entries.update(files)
        for file, entry in entries.items():
            if Path(file).name != file or type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"{file} has the entry {entry}")
        rewards = {self.rewards} - {None}
        if set(self.files) != {REFERENCE_NAME} | rewards or (self.complete and not (rewards and self.shards)):
            raise ValueError(f"its files are {', '.join(self.files)}")
        header = self.header
        numbers = (header.width, header.hidden_size, header.vocab_size, header.shortlist_size)
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError("its sizes are no counts")
        _ = (
            header.temperature + header.logit_scale,
            header.keys.items(),
            header.base_settings.items(),
            self.notes.items(),
        )
        if self.relabelled is not None:
            _ = ", ".join(self.relabelled)

    def damage(self, folder: Path, digests: bool = True) -> Iterator[tuple[str, str]]:
        """Yield ``(name, what is wrong)`` of every damaged part; ``digests`` off compares sizes only.

        The name is a shard's, or that of a file beside the shards.
        """
        listed = [(name, {name: entry}) for name, entry in self.files.items()]
        listed += [(item["name"], item["files"]) for item in (*self.shards, *self.parts)]
        for name, entries in listed:
            for file, entry in entries.items():
                wrong = file_damage(folder / file, entry, digests)
                if wrong is not None:
                    yield name, wrong
                    break

    def damage_error(self, folder: Path, name: str, wrong: str) -> TeaError:
        """One line about a damaged part, with the command that mends it."""
        advice = "run the tea-rl embed or tea-rl rollout that made it again, which mends it"
        if name == self.rewards and self.relabelled is not None:
            advice = (
                f"run tea-rl relabel {folder} again with the rewards it had ({', '.join(self.relabelled)})"
            )
        return TeaError(f"the store {folder} is damaged in {name}: {wrong}; {advice}")


def _own_digest(value: dict[str, Any]) -> str:
    """SHA-256 (hex) over the manifest's values beside the digest itself."""
    rest = {name: item for name, item in value.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("ascii")).hexdigest()


def _damaged_manifest(path: Path, error: Exception) -> TeaError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TeaError(
        f"{path} is damaged, or not the manifest of a state store ({reason}); remove the store with rm -r {path.parent} and "
        "run the tea-rl embed or tea-rl rollout that made it again, or choose another folder"
    )


def file_damage(path: Path, entry: dict[str, Any], digests: bool = True) -> str | None:
    """What is wrong with a file, or None; ``digests`` off compares sizes only."""
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
