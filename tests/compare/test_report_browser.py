"""The page in a real browser: no errors, no requests, tables, filter, sort and colours. Marked ``browser``."""

import os
import shutil

import pytest
from comparisons import base, comparison, failed, full_comparison, lora, seed_result

from tea_rl.compare import report
from tea_rl.compare.report import write_comparison
from tea_rl.compare.results import Sample, write_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
    ),
]
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NASTY = '</script><script>document.title="hacked"</script><img src=x onerror="document.title=1"> & \x00\x1b \u202eback'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, headless=True, args=ARGUMENTS,
            env={**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))},
        )  # fmt: skip
        yield context
        context.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of a full comparison, drawn once."""
    folder = tmp_path_factory.mktemp("full")
    write_json(full_comparison(), folder / "results.json")
    return write_comparison(folder)


@pytest.fixture
def show(browser, tmp_path, full, monkeypatch):
    """Opens the full page, or that of given results without plots; afterwards nothing may have been complained about or asked for."""
    complaints, requests, pages = [], [], []
    monkeypatch.setattr(report, "draw_all", lambda results, summary: [])

    def open_page(results=None, width=1280):
        path = full
        if results is not None:
            write_json(results, tmp_path / "results.json")
            path = write_comparison(tmp_path)
        page = browser.new_page()
        pages.append(page)
        page.set_default_timeout(120_000)  # the machine may be busy
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert sum(url.startswith("file:") for url in requests) == len(pages)


def rewards(page, method):
    """Rewards of a method's cells, as shown, from top to bottom."""
    cells = page.locator(f".cell:has(.who:text-is('{method}')) .badge")
    return [float(text) for text in cells.all_inner_texts()]


def test_tables_and_plots_are_there(show):
    page = show()
    for name, rows in (
        ("summary", 9),
        ("details", 6),
        ("costs", 6),
        ("peers", 3),
        ("forgetting", 6),
        ("tried", 8),
    ):
        assert page.locator(f"#{name} tbody tr").count() == rows, name
    loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 100)")
    assert loaded == [True] * 4
    first = page.locator("#summary tbody tr").first
    assert "tea" in first.inner_text() and first.get_attribute("class") == "ours"


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(show, width):
    page = show(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_filter_keeps_what_holds_the_text(show):
    page = show()
    assert page.locator(".count").inner_text() == "24 of 24 prompts"
    page.get_by_label("Filter by text").fill("MOVIE")
    assert page.locator(".count").inner_text() == "1 of 24 prompts"
    assert page.locator(".card h3").all_inner_texts() == ["The movie was"]
    page.get_by_label("Filter by text").fill("great great")
    assert page.locator(".count").inner_text() == "24 of 24 prompts"  # the hacker wrote it everywhere
    page.get_by_label("Filter in").select_option("tea")
    assert page.locator(".count").inner_text() == "0 of 24 prompts"
    assert page.locator(".card").count() == 0


def test_sorting_goes_by_the_reward_of_a_method(show):
    page = show()
    page.get_by_role("button", name="Show more").click()
    shown = rewards(page, "tea")
    assert len(shown) == 24 and shown != sorted(shown)
    page.get_by_label("Sort by").select_option("down:tea")
    page.get_by_role("button", name="Show more").click()
    assert rewards(page, "tea") == sorted(shown, reverse=True)
    page.get_by_label("Sort by").select_option("up:tea")
    assert rewards(page, "tea") == sorted(shown)[:12]
    assert not page.get_by_role("button", name="Show more").is_hidden()


def test_methods_can_be_hidden_and_shown(show):
    page = show()
    assert rewards(page, "tea") and not rewards(page, "best-of-n")
    page.get_by_role("checkbox", name="tea", exact=True).uncheck()
    page.get_by_role("checkbox", name="best-of-n").check()
    assert not rewards(page, "tea") and rewards(page, "best-of-n")


def test_tokens_are_coloured_by_their_gain(show):
    tokens = [" up", " down", " same", ""]
    sample = Sample(
        prompt="P", completion=" up down same", reward=0.5, tokens=tokens, gains=[2.5, -1.0, 0.0, 0.3]
    )
    page = show(comparison(base(), lora(seeds=[seed_result(0.5, samples=[sample])])))
    page.get_by_label("Filter by text").fill("up down")
    found = page.locator(".token")
    assert found.all_text_contents() == tokens[:3]
    colours = found.evaluate_all("all => all.map(token => getComputedStyle(token).backgroundColor)")
    assert colours == ["rgba(26, 127, 55, 0.45)", "rgba(207, 34, 46, 0.2)", "rgba(0, 0, 0, 0)"]
    assert found.first.get_attribute("title") == "+2.50 nats"
    page.get_by_label("Colour tokens").uncheck()
    assert page.locator(".token").count() == 0
    assert page.locator(".cell p").first.text_content() == " up down same"


def test_what_a_model_wrote_is_only_text(show):
    sample = Sample(
        prompt=NASTY, completion=NASTY, reward=0.5, terms={NASTY: 1.0}, tokens=[NASTY], gains=[1.0]
    )
    method = lora(name="x-lora", reason=NASTY, seeds=[seed_result(0.5, samples=[sample])])
    page = show(comparison(base(), method, *failed(), recipe=NASTY, command=NASTY))
    assert "hacked" in page.title() and page.title() != "hacked"  # the recipe's name, as text
    assert page.locator("img:not([src^='data:'])").count() == 0
    page.get_by_label("Filter by text").fill("onerror")
    visible = NASTY.replace("\x00", "\u2400").replace("\x1b", "\u241b")
    assert page.locator(".card h3").first.text_content() == visible
    assert page.locator(".cell p").first.text_content() == visible


@pytest.mark.parametrize("methods", [[], failed(), [base()]], ids=["nothing", "all-failed", "base-alone"])
def test_empty_comparisons_load(show, methods):
    page = show(comparison(*methods))
    assert page.locator("h1").inner_text() == "quickstart: methods compared"
