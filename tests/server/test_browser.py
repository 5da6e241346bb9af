"""The status page in a real browser, over a real worker: what people see of it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import pytest

from tests.support.browsers import Browser
from tests.support.configs import configuration, hosted
from tests.support.provider import FakeProvider, status
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROWS = 300
REFUSED = {"title 7", "title 130"}

DESKTOP = (1280, 900)
PHONE = (390, 844)


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline], provider: FakeProvider) -> Pipeline:
    provider.rejects = lambda text: text in REFUSED
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    database.execute(f"INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, {ROWS}) AS i")
    database.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 30) AS i")
    return make_pipeline(
        configuration(
            database.dsn,
            worker_lines="backfill_page_rows = 20\nbackfill_max_rows_per_s = 20\nevaluate_every_s = 0.5",
            embedders={"hosted": hosted(provider.url)},
            indexes={"articles": {}, "notes": {"text": "{body}", "inline_budget_ms": 0}},
        )
    )


class Page:
    """The page as it is seen: only what is not hidden."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def text(self, selector: str) -> str:
        """Return what an element shows, nothing when it is not seen."""
        shown: str = self.browser.ask(
            "const one = document.querySelector(arguments[0]);"
            " return one && one.checkVisibility() ? one.innerText : ''",
            selector,
        )
        return shown

    def card(self, index: str) -> str:
        """Return what is said of an index."""
        return self.text(f'#indexes [data-name="{index}"]')

    def state(self, index: str) -> str:
        """Return an index's state."""
        return self.text(f'#indexes [data-name="{index}"] .badge')

    def figure(self, stage: str) -> float:
        """Return the figure of a stage of the picture; 0 while it is not known."""
        found = re.match(r"[\d,.]+", self.text(f"#{stage} [data-f=value]"))
        return float(found[0].replace(",", "")) if found else 0.0

    def progress(self, index: str) -> float:
        """Return the share of the index's load that its bar shows, in percent; 0 when there is no bar."""
        shown = self.browser.ask(
            "const bar = document.querySelector(arguments[0]);"
            " return bar && bar.checkVisibility() ? Number(bar.getAttribute('aria-valuenow')) : 0",
            f'#indexes [data-name="{index}"] [role=progressbar]',
        )
        return float(shown)

    def tone(self) -> str:
        """Return the tone of the headline, which is its colour."""
        return str(self.browser.ask("return document.getElementById('headline').classList[1]"))

    def fits(self) -> bool:
        """Whether nothing sticks out at the side."""
        return bool(self.browser.ask("return document.documentElement.scrollWidth <= window.innerWidth"))

    def luminance(self) -> float:
        """Return how bright the ground is, from 0 to 255."""
        colour = self.browser.ask("return getComputedStyle(document.body).backgroundColor")
        red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def unexpected(browser: Browser) -> list[str]:
    """Return what the console complained of, but for /readyz saying with its status that the worker is not ready."""
    return [one for one in browser.complaints() if not re.search(r"/readyz .* 503", one)]


def test_the_page_shows_a_first_load_live_rates_failures_and_a_paused_index(
    database: Database, pipeline: Pipeline, provider: FakeProvider, browser: Browser
) -> None:
    page = Page(browser)
    worker = pipeline.start()
    port = pipeline.event("listening")["port"]
    browser.look(DESKTOP, dark=False)
    browser.driver.get(f"http://127.0.0.1:{port}/")

    until(lambda: 0 < page.progress("articles") < 100, lambda: f"a progress bar; the page says: {page.text('body')}")
    until(
        lambda: re.fullmatch(r"loading \d+%, .+ left", page.state("articles")),
        lambda: f"the time left; the page says: {page.text('body')}",
    )
    assert re.search(r"rows: \d+ of 300, \d+%", page.card("articles"))
    assert re.search(r"vectors: \d+ of ~?\d+, \d+%", page.card("articles"))
    assert re.match(r"(articles|notes): loading", page.text("#headline"))
    assert page.tone() == "busy"
    assert "first load" in page.text("#events")
    browser.screenshot("status-loading")
    assert page.luminance() > 200
    assert page.fits()

    pipeline.path.write_text(pipeline.path.read_text().replace("backfill_max_rows_per_s = 20", ""))
    worker.send_signal(signal.SIGHUP)  # the rest of the load need not take its time
    pipeline.live()
    with database.connect() as writer:
        number = 1000

        def busy() -> bool:
            nonlocal number
            for _ in range(5):
                number += 1
                writer.execute("INSERT INTO notes VALUES (%s, %s)", [number, f"note {number}"])
            return all(page.figure(stage) > 0 for stage in ("source", "apply", "vectors")) and number > 1060

        until(busy, lambda: f"rates; the page says: {page.text('.flow')}")
    assert "WAL/s" in page.text("#source")
    assert re.search(r"\d+ for \d+ chunks", page.text("#vectors"))
    browser.look(DESKTOP, dark=True)
    assert page.luminance() < 50
    browser.screenshot("status-dark")
    until(lambda: "2 chunks have no vector" in page.text("#problems"), "the failures to be told")
    database.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, commit_lsn)"
        " VALUES ('articles', '{0}', '', '0/1')"
    )
    until(lambda: "1 row is left out" in page.text("#problems"), "the row that is left out to be told")
    assert re.search(r"documents\s+300\s+1 left out", page.card("articles"))
    until(
        lambda: re.search(r"^up to date, \d+(\.\d)? m?s$", page.text("#headline")),
        lambda: f"a stream that caught up: {page.text('body')}",
    )
    assert page.tone() == "good"
    assert re.search(r"found by words\s+\d+", page.card("notes"))
    assert re.search(r"found by meaning\s+\d+", page.card("notes"))
    assert "reserved" in page.text("section[aria-labelledby=slot-title]")
    assert "hashing, 16 dimensions, generation 1" in page.card("articles")
    until(
        lambda: re.search(r"recall@10\s+1\.000\s+whole table, just now", page.card("articles")),
        lambda: f"a recall; the page says: {page.card('articles')}",
    )
    assert unexpected(browser) == []
    browser.look(DESKTOP, dark=False)
    browser.screenshot("status-quiet")

    provider.always = status(500)
    database.execute("UPDATE articles SET title = 'changed ' || id WHERE id < 20")
    until(
        lambda: re.match(r"articles: \d+ texts wait for vectors: ", page.text("#headline")),
        lambda: f"a failing embedder; the page says: {page.text('body')}",
    )
    assert page.tone() == "bad"
    browser.screenshot("status-failing")
    provider.always = None
    until(lambda: page.tone() == "good", lambda: f"an embedder that is back: {page.text('body')}")

    database.execute("ALTER TABLE notes DROP COLUMN body")
    database.execute("INSERT INTO notes VALUES (5000)")
    until(lambda: page.state("notes") == "paused", lambda: f"a paused index; the page says: {page.text('body')}")
    assert "column body" in page.card("notes")
    assert re.search(r"\(just now\)", page.card("notes"))
    assert page.text("#headline").startswith("notes: paused: ")
    assert page.tone() == "bad"
    assert re.search(r"(just now|for [\d.]+ s)\s+notes\s+paused: ", page.text("#events"))
    # The stream and the examination after it tell of the pause in words of their own, one after the other.
    until(
        lambda: page.text("#problems").count("index notes is paused") == 1,
        lambda: f"one reason of the pause; the page says: {page.text('#problems')}",
    )
    assert page.state("articles").startswith("up to date")
    browser.screenshot("status-paused")
    for dark in (False, True):
        browser.look(PHONE, dark=dark, phone=True)
        assert page.fits()
        browser.screenshot(f"status-phone{'-dark' if dark else ''}")
    assert unexpected(browser) == []

    assert pipeline.stop(worker) == 0
    until(lambda: "does not answer" in page.text("#outage"), "the page to notice that the worker is gone")
    assert page.text("#main")
    browser.screenshot("status-no-answer")


@pytest.mark.proof
def test_the_page_shows_both_generations_of_an_index_whichever_of_them_searches_use(
    pipeline: Pipeline, browser: Browser
) -> None:
    page = Page(browser)
    once = pipeline.path.read_text().replace("backfill_max_rows_per_s = 20", "")
    pipeline.path.write_text(once)
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    pipeline.path.write_text(once.replace("[indexes.notes]", '[indexes.notes]\nvector_type = "halfvec"'))
    worker = pipeline.start()
    until(lambda: pipeline.times("listening") == 2, pipeline.tail)
    port = [event for event in pipeline.events() if event["event"] == "listening"][-1]["port"]
    browser.look(DESKTOP, dark=False)
    browser.driver.get(f"http://127.0.0.1:{port}/")
    until(lambda: "generation 1" in page.card("notes"), lambda: page.text("body"))
    assert "generation 2" not in page.card("notes")

    assert pipeline.command("migrate", "notes", "start", "--yes").returncode == 0
    beside = r"generation {}\s+ready\s*hosted, {}\(16\)"
    until(
        lambda: re.search(beside.format(2, "halfvec"), page.card("notes")),
        lambda: f"the second generation; the page says: {page.card('notes')}",
    )
    assert "16 dimensions, generation 1" in page.card("notes")
    assert "generation 2" not in page.card("articles")
    assert page.fits()
    browser.screenshot("status-generations")

    assert pipeline.command("migrate", "notes", "activate").returncode == 0
    until(
        lambda: re.search(beside.format(1, "vector"), page.card("notes")),
        lambda: f"the first generation beside the second; the page says: {page.card('notes')}",
    )
    assert "16 dimensions, generation 2" in page.card("notes")
    browser.look(PHONE, dark=True, phone=True)
    assert page.fits()
    browser.screenshot("status-generations-phone")

    assert pipeline.command("migrate", "notes", "drop", "--yes").returncode == 0
    until(lambda: "generation 1" not in page.card("notes"), lambda: page.card("notes"))
    assert unexpected(browser) == []
    assert pipeline.stop(worker) == 0


def test_a_page_that_breaks_its_policy_would_be_noticed(pipeline: Pipeline, browser: Browser) -> None:
    pipeline.start()
    port = pipeline.event("listening")["port"]
    browser.driver.get(f"http://127.0.0.1:{port}/")
    assert unexpected(browser) == []

    browser.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    browser.ask("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.2/picture.png'}))")

    complaints: list[str] = []

    def told() -> bool:
        complaints.extend(unexpected(browser))
        return len(complaints) >= 2

    until(told, "two violations to be told")
    assert all("Content Security Policy" in one for one in complaints)
    assert browser.ask("return window.ran === undefined")
