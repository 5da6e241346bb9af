"""The search page in a real browser: a question, filters by type, why a hit is there, problems, phone and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.workers import until

if TYPE_CHECKING:
    from tests.support.browsers import Browser

pytestmark = pytest.mark.server


def fill(browser: Browser, selector: str, value: str) -> None:
    browser.ask("document.querySelector(arguments[0]).value = arguments[1]", selector, value)


def submit(browser: Browser) -> None:
    browser.ask("document.getElementById('form').requestSubmit()")


def shown(browser: Browser, selector: str = "#hits li") -> list[str]:
    texts: list[str] = browser.ask(
        "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector
    )
    return texts


CONTRAST = """
const light = colour => {
    const [red, green, blue] = colour.match(/[\\d.]+/g).map(one => one / 255)
        .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
};
const ground = document.body.appendChild(document.createElement('div'));
ground.style.background = 'Canvas';
const of = (one, on) => {
    const both = [light(getComputedStyle(one).color), light(getComputedStyle(on).backgroundColor)];
    return Math.max(...both) / Math.min(...both);
};
const found = [...document.querySelectorAll('.meta, .note, label')].map(one => of(one, ground));
found.push(of(document.querySelector('button'), document.querySelector('button')));
ground.remove();
return Math.min(...found);
"""
"""Returns the lowest contrast of small text and its ground, as WCAG counts it."""

READABLE = 4.5
"""WCAG 2.1, 1.4.3 (AA)."""


def test_a_person_searches_filters_and_sees_why(served_address: str, browser: Browser) -> None:
    browser.look((1100, 800), dark=False)
    browser.driver.get(f"{served_address}/")
    until(lambda: shown(browser, "#filters label"), "the fields of the filters")
    fill(browser, "#query", "printer")
    submit(browser)
    until(lambda: len(shown(browser)) == 10, lambda: f"ten hits; there are {shown(browser, 'main')}")
    first = shown(browser)[0]
    assert "printer" in first
    assert "by meaning" in first or "by words" in first
    assert "printer" in shown(browser, "#hits mark")
    assert browser.ask(CONTRAST) >= READABLE
    browser.screenshot("serve")

    fill(browser, "[data-column=status]", "open")
    fill(browser, "[data-column=id]", "7")
    submit(browser)
    until(lambda: shown(browser, "#note") and "Nothing" in shown(browser, "#note")[0], "no hit")
    fill(browser, "[data-column=id]", "4")
    submit(browser)
    until(lambda: len(shown(browser)) == 1, "one hit")
    assert "status: open" in shown(browser)[0]

    browser.ask("document.querySelector('#hits details').open = true")
    assert "ticket 4: the printer" in shown(browser, "#hits details")[0]
    fill(browser, "[data-column=id]", "")
    fill(browser, "[data-column=opened][data-operator=gte]", "2026-04-01")
    fill(browser, "[data-column=opened][data-operator=lte]", "2026-04-03")
    submit(browser)
    until(
        lambda: shown(browser) and all("opened: 2026-04-0" in one for one in shown(browser)),
        lambda: f"April; there are {shown(browser)}",
    )

    # The address has the question, and a page that is opened again asks it.
    browser.driver.refresh()
    until(lambda: len(shown(browser)) == 10, "ten hits")

    browser.look((390, 800), dark=True, phone=True)
    assert browser.ask("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.ask(CONTRAST) >= READABLE
    browser.screenshot("serve-dark-phone")
    assert browser.complaints() == []


def test_a_problem_says_what_to_change(served_address: str, browser: Browser) -> None:
    browser.driver.get(f"{served_address}/")
    until(lambda: shown(browser, "#filters label"), "the fields of the filters")
    fill(browser, "#query", "x" * 5_000)
    submit(browser)
    until(lambda: shown(browser, "#hits .problem"), "a problem")
    assert "use at most 4000 characters" in shown(browser, "#hits .problem")[0]
