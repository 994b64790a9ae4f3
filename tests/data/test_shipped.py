"""Datasets named without a file: made or fetched once, then read like a user's own."""

import io
import json
import subprocess
import tarfile

import pytest

from tea_rl.data import shipped
from tea_rl.errors import TeaError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEA_RL_CACHE", str(tmp_path / "cache"))


def rows(name, **kwargs):
    path = shipped.shipped_dataset(f"tea_rl/{name}", kwargs)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_facts_ask_about_the_same_people_in_words_never_trained_on():
    pytest.importorskip("faker")
    found = rows("facts", num_people=7)
    training = [row for row in found if row["split"] == "train"]
    questions = [row for row in found if row["split"] == "test"]
    assert (len(training), len(questions)) == (7 * 8, 7 * 2)
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in questions}
    born = {row["prompt"].removesuffix(" was born in"): row["completion"] for row in training[:7]}
    for row in questions:
        (name,) = [name for name in born if name in row["prompt"]]
        assert row["completion"] == born[name]
    assert rows("facts", num_people=7, seed=1) != found


def test_a_dataset_is_made_once(monkeypatch):
    pytest.importorskip("faker")
    before = rows("facts", num_people=3)
    monkeypatch.setattr(shipped, "_facts", None)
    assert rows("facts", num_people=3) == before


def archive(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo(f"somewhere/{name}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def test_english_is_long_and_short_texts_in_turn(monkeypatch):
    film = "".join(f"{n}\t0.5\tSentence {n}.\n" for n in range(30)).encode()
    news = b"7_2\t0\tThen more.\n7_1\t1\tIt began.\n8_1\t0\tAnother one.\n8_10\t0\tThe end.\n8_2\t0\tIts middle.\n"
    files = {"movieReviewSnippets_GroundTruth.txt": film, "nytEditorialSnippets_GroundTruth.txt": news}
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    fetched = archive("hutto_ICWSM_2014.tar.gz", inner.getvalue())
    monkeypatch.setattr(shipped, "_pip_download", lambda *_: fetched)
    texts = [row["completion"] for row in rows("english", size=15)]
    assert {texts[0], texts[11]} == {"It began. Then more.", "Another one. Its middle. The end."}
    sentences = texts[1:11] + texts[12:]
    assert len(set(sentences)) == 13 and all(text.startswith("Sentence") for text in sentences)


def test_movie_reviews_are_read_out_of_the_fetched_archive(monkeypatch):
    table = b"1\t2.5\tA joy .\n2\t-1.25\tA bore .\n3\t0\tA film .\n"
    inner = archive("movieReviewSnippets_GroundTruth.txt", table)
    fetched = archive("hutto_ICWSM_2014.tar.gz", inner)
    monkeypatch.setattr(shipped, "_pip_download", lambda *_: fetched)
    found = rows("movie-reviews", size=3)
    assert {(row["completion"], row["reward"]) for row in found} == {
        ("A joy .", 2.5), ("A bore .", -1.25), ("A film .", 0.0),
    }  # fmt: skip
    assert len(rows("movie-reviews", size=2)) == 2


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("fact", {}, ["tea_rl/fact", "facts"]),
        ("facts", {"people": 3}, ["people", "num_people"]),
        ("true-false", {"size": 3}, ["size", "none"]),
    ],
)
def test_a_wrong_name_or_setting_is_one_line(name, kwargs, words):
    with pytest.raises(TeaError) as caught:
        shipped.shipped_dataset(f"tea_rl/{name}", kwargs)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_no_pip_no_traceback(monkeypatch):
    refusal = subprocess.CompletedProcess([], 1, "", "ERROR: no network\nERROR: nothing found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refusal)
    with pytest.raises(TeaError, match=r"could not fetch vaderSentiment.*nothing found.*data\.dataset"):
        shipped.shipped_dataset("tea_rl/movie-reviews", {})
