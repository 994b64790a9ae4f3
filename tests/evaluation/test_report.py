import html.parser
import json
import math

import pytest

from tea_rl.errors import TeaError
from tea_rl.evaluation.report import write_report

RECIPE = """
name: cheerful
description: Say it <nicely>.
model: {name_or_path: some/model}
rewards:
  - {name: sentiment, weight: 1.0}
  - {name: repetition, weight: 2.0}
data: {prompts: [The film was, "A <b>dog</b>"]}
train: {learning_rate: 0.0003}
"""


class Page(html.parser.HTMLParser):
    """Tags, addresses and text of a page; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.fixture
def run(tmp_path):
    metrics = [
        {"step": 0, "eval_reward": 0.25, "eval_reward/sentiment": 0.3, "eval_reward/repetition": -0.05}
    ]
    metrics += [
        {"step": i, "reward": i / 10, "kl": 0.1 * i, "seconds": 30.0, "skipped_steps": 2} for i in range(1, 9)
    ]
    metrics.append({"step": 8, "eval_reward": 0.8125, "eval_reward/sentiment": 0.9, "eval_kl": math.nan})
    samples = [
        {
            "step": step,
            "prompt": "A <script>alert(1)</script>",
            "base": " ran & hid",
            "trained": f' said "hello" at {step}\n',
            "base_reward": -0.5,
            "trained_reward": 0.875,
        }
        for step in (0, 4, 8)
    ]
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"packages": {"torch": "2.13.0"}, "base_model_digest": "ab" * 32})
    )
    for name, found in (("metrics", metrics), ("samples", samples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tmp_path


def test_the_page_tells_what_the_run_did(run):
    path = write_report(run)
    assert path == run / "report.html"
    text = Page(path.read_text(encoding="utf-8")).text
    for expected in (
        "cheerful",
        "Say it <nicely>.",
        "0.25",
        "0.81",
        "8 steps",
        "4.0 min of training",
        "2.13.0",
    ):
        assert expected in text
    for expected in (
        "Reward term: sentiment",
        "NaN",
        "2 updates were skipped",
        "learning_rate",
        "0.0003",
        "ab" * 32,
    ):
        assert expected in text
    assert "rewards" in text and "[1].weight" in text


def test_what_a_model_wrote_is_escaped_and_both_sides_are_shown(run):
    source = write_report(run).read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "b" not in page.tags
    assert "A <script>alert(1)</script>" in page.text and "ran & hid" in page.text
    assert page.text.index("at 8") < page.text.index("at 4")
    assert "at 0" not in page.text
    assert "-0.50" in page.text and "0.88" in page.text


@pytest.mark.parametrize(
    ("prompt", "shown", "hidden"),
    [
        ("Guess: 4\nLower.\n\n" * 30 + "Find my number.\nGuess:", "...\nFind my number.\nGuess:", "Lower"),
        ("word " * 200 + "\n" + "Q: last?\nA:", "Q: last?\nA:", "word " * 60),
        ("x" * 900, "...\n" + "x" * 200, "x" * 300),
        ("a" * 200, "a" * 200, "..."),
    ],
)
def test_of_a_long_prompt_the_last_words_are_shown(run, prompt, shown, hidden):
    sample = {"step": 8, "prompt": prompt, "base": "b", "trained": "t", "base_reward": 0, "trained_reward": 0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    source = write_report(run).read_text(encoding="utf-8")
    cell = source.partition('<td class="prompt">')[2].partition("</td>")[0]
    assert shown in cell and hidden not in cell


def test_the_page_needs_nothing_beside_it(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "link" not in page.tags


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: begun\n")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "begun" in text and "No held-out evaluation" in text


def test_a_torn_line_does_not_matter(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "rew')
    assert "0.81" in write_report(run).read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(TeaError, match="tea-rl train"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_manifest_is_named(run):
    (run / "manifest.json").write_text("{")
    with pytest.raises(TeaError, match="manifest.json"):
        write_report(run)
