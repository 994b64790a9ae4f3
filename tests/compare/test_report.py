"""The page of a comparison: what it says, that nothing escapes, and that it needs nothing beside it."""

import html.parser
import json
import re

import pytest
from command_line import last_error
from command_line import tea as run
from comparisons import base, comparison, completion, failed, full_comparison, hacker, lora, seed_result, tea

from tea_rl.compare import report
from tea_rl.compare.report import write_comparison
from tea_rl.compare.results import Forgetting, Sample, write_json
from tea_rl.errors import TeaError

NASTY = '</script><script>document.title="hacked"</script><img src=x onerror=alert(1)> & "quotes" \x00\x1b[31m \u2028 \u202eback'


class Page(html.parser.HTMLParser):
    """Tags, addresses, texts and table cells of a page; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.links, self.text, self.ids, self.data = [], [], [], "", set(), ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.ids.add(given.get("id"))
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.data = data if data.startswith("{") else self.data
        elif self.open[-1:] != ["style"]:
            self.text += data + "\n"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The folder of a full comparison, its page and plots drawn once."""
    folder = tmp_path_factory.mktemp("full")
    write_json(full_comparison(), folder / "results.json")
    write_comparison(folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of the time and are looked at in `full`."""
    monkeypatch.setattr(report, "draw_all", lambda results, summary: [])


def read(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def page_of(tmp_path, results) -> Page:
    write_json(results, tmp_path / "results.json")
    return Page(write_comparison(tmp_path).read_text(encoding="utf-8"))


def nasty_comparison():
    seed = seed_result(0.5)
    seed.samples = [
        Sample(prompt=NASTY, completion=NASTY, reward=0.5, terms={NASTY: 1.0}, tokens=[NASTY], gains=[1.0])
    ]
    seed.metrics.terms = {NASTY: 0.1}
    seed.metrics.independent[NASTY] = 0.3
    seed.metrics.forgetting = Forgetting(english_perplexity=3.0, tasks={NASTY: 2.0})
    method = lora(name=NASTY, reason=NASTY, seeds=[seed])
    method.tried[0].reason = NASTY
    broken = failed()[0].model_copy(update={"reason": NASTY})
    return comparison(
        base(), method, broken, recipe=NASTY, command=NASTY, settings={NASTY: {NASTY: NASTY}}, versions={NASTY: NASTY},
        machine={NASTY: NASTY},
    )  # fmt: skip


def test_the_page_says_who_leads_what_holds_and_what_to_beware_of(full):
    page = read(full)
    text = " ".join(page.text.split())
    for expected in (
        "leads with a held-out reward of",
        "rloo-lora has more reward",
        "peak memory at most 20% of grpo-lora: yes, 16%",
        "Reward hacking rloo-lora",
        "ran out of memory: needed more than 8.0 GB",
        "ValueError: <b>no pairs</b> left",
        "not reached",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tea-rl compare quickstart --methods",
        "2.13.0",
        "Monte-Carlo",
    ):
        assert expected in text, expected
    assert {"summary", "details", "costs", "peers", "forgetting", "tried", "browser"} <= page.ids


def test_a_claim_that_does_not_hold_is_denied_in_plain_words(tmp_path, undrawn):
    text = " ".join(page_of(tmp_path, comparison(base(), tea(1), lora(level=100.0))).text.split())
    assert re.search(r"reward 0.8 at least 8 times sooner than best grpo-lora: no, [1-7]\.\d", text)


def test_every_plot_is_also_a_file(full):
    page = read(full)
    names = {"reward-time", "reward-calls", "frontier", "memory"}
    assert names <= page.ids
    for name in names:
        assert (full / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_beside_it_and_repeats(full):
    page = read(full)
    first = (full / "report.html").read_bytes()
    assert len(page.links) == 4 and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "link" not in page.tags and b"http-equiv" in first
    assert write_comparison(full).read_bytes() == first


def test_nothing_that_a_model_wrote_is_markup(tmp_path, undrawn):
    page = page_of(tmp_path, nasty_comparison())
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.tags.count("script") == 2 and set(page.links) == {
        link for link in page.links if link.startswith("data:")
    }
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", source)
    assert source.count("</script>") == 2 and "onerror=alert(1)>" not in source
    (row,) = [row for row in json.loads(page.data)["prompts"] if "hacked" in row["prompt"]]
    assert '</script><script>document.title="hacked"' in row["prompt"]


@pytest.mark.parametrize(
    "methods",
    [[], failed(), [tea(1)], [base()], [lora()], [base(), hacker()], [base(), lora(tried=[], seeds=[seed_result(0.4, samples=[])])]],
    ids=["nothing", "all-failed", "ours-alone", "base-alone", "peer-alone", "only-a-hacker", "no-curve-no-samples"],
)  # fmt: skip
def test_empty_parts_leave_no_empty_headings(tmp_path, methods):
    results = comparison(*methods, levels=[], settings={}, versions={}, machine={})
    write_json(results, tmp_path / "results.json")
    source = write_comparison(tmp_path).read_text(encoding="utf-8")
    Page(source)
    assert not re.search(r"<h2>[^<]*</h2>(<p class=\"note\">[^<]*</p>)?</section>", source.replace(
        '<p class="note">None.</p>', "None."))  # fmt: skip
    assert "nan" not in source.lower().split("<script")[0].split("</style>")[1].replace("nancy", "")


def test_tokens_that_do_not_spell_the_completion_are_not_shown(tmp_path, undrawn):
    good = completion((" fine text",), 0.5, "One", 0)
    bad = good.model_copy(update={"prompt": "Two", "tokens": [" other", " words"]})
    rows = json.loads(
        page_of(tmp_path, comparison(lora(seeds=[seed_result(0.4, samples=[good, bad])]))).data
    )["prompts"]
    shown = {row["prompt"]: row["samples"]["grpo-lora"]["tokens"] for row in rows}
    assert shown == {"One": [" fine", " text"], "Two": []}


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(TeaError, match="tea-rl compare"):
        write_comparison(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_renders_runs_and_comparisons_again(tmp_path, capsys, undrawn):
    one, two = tmp_path / "run", tmp_path / "comparison"
    one.mkdir()
    two.mkdir()
    (one / "recipe.yaml").write_text("name: begun\n")
    write_json(full_comparison(), two / "results.json")
    code, out, _ = run(capsys, "report", one, two)
    assert code == 0 and out.split() == [str(one / "report.html"), str(two / "report.html")]
    assert "begun" in (one / "report.html").read_text() and "grpo-lora" in (two / "report.html").read_text()
    code, out, _ = run(capsys, "report", two, "--json")
    assert json.loads(out) == [str(two / "report.html")]


def test_the_command_refuses_other_folders_before_it_writes(tmp_path, capsys):
    good = tmp_path / "comparison"
    good.mkdir()
    write_json(comparison(tea(1)), good / "results.json")
    assert "recipe.yaml nor results.json" in last_error(run(capsys, "report", good, tmp_path / "nothing"))
    assert not (good / "report.html").exists()
