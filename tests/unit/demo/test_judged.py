"""The demo's judged collection: questions that each have one answer among the entries."""

from __future__ import annotations

from cdcsync.demo.corpus import Entry
from cdcsync.demo.judged import QUESTIONS, summaries
from cdcsync.demo.material import read_entries


def test_each_first_line_is_answered_by_the_entry_that_it_is_from() -> None:
    entries = read_entries(300)
    collection = summaries(entries)
    assert len(collection.queries) == len(collection.grades) == QUESTIONS
    first_lines = {f"{entry.module},{entry.name}": entry.doc.partition("\n")[0].strip() for entry in entries}
    for query, text in collection.queries.items():
        ((key, grade),) = collection.grades[query].items()
        assert (first_lines[key], grade) == (text, 1)


def test_lines_that_are_short_or_shared_are_no_questions() -> None:
    twice = "Return the same thing twice."
    docs = ("Do it.", twice, twice, "Return one thing only once.\n\nMore.")
    collection = summaries([Entry("m", f"f{at}", "f()", doc) for at, doc in enumerate(docs)])
    assert (collection.queries, collection.grades) == ({"1": "Return one thing only once."}, {"1": {"m,f3": 1}})
