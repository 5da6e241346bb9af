"""A class of the user's makes the vectors of an index: the example of docs/embedders.md, with a real worker."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

EXAMPLES = ROOT / "examples"

WORDS = """\
cat 1 0 0.5
dog 0 1 0.5
car 0 0 -1
"""


FASTTEXT = "6 3\n" + WORDS.replace("\n", " \n") + ". . . 7 7 7 \nno\u00a0break 7 7 7 \nline\u2028break 7 7 7 \n"
"""How many words and numbers there are, and spaces after them; words that hold spaces and what can be a line's end."""


@pytest.mark.parametrize("content", [WORDS, FASTTEXT], ids=["GloVe", "fastText"])
def test_the_example_reads_both_kinds_of_file_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "vectors").write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(EXAMPLES)
    made = importlib.import_module("word_vectors").WordVectors(str(tmp_path / "vectors"))
    made.open()
    vectors = made.embed(["Cat", "cat and dog", made.harmless_text], kind="document")
    assert [[*map(float, one)] for one in vectors] == [[1, 0, 0.5], [0.5, 0.5, 0.5], [1, 0, 0.5]]
    assert made.dimensions == 3


def test_the_example_embeds_documents_and_a_text_that_it_rejects_is_listed(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path
) -> None:
    (tmp_path / "vectors.txt").write_text(WORDS)
    own = {"type": "python", "class": "word_vectors:WordVectors", "options": {"path": str(tmp_path / "vectors.txt")}}
    pipeline = make_pipeline(configuration(database.dsn, embedders={"own": own}, indexes={"pets": {}}))
    pipeline.source.execute("CREATE TABLE pets (id int PRIMARY KEY, title text)")
    pipeline.source.execute("INSERT INTO pets VALUES (1, 'Cat and dog'), (2, 'car'), (3, 'unicorn')")
    worker = pipeline.start(PYTHONPATH=str(EXAMPLES))
    pipeline.live()

    def vectors() -> dict[int, str]:
        return dict(pipeline.target.execute("SELECT id, embedding::text FROM pets_index").fetchall())

    until(lambda: vectors() == {1: "[0.5,0.5,0.5]", 2: "[0,0,-1]"}, lambda: f"{vectors()} {pipeline.tail()}")
    pipeline.source.execute("UPDATE pets SET title = 'dog' WHERE id = 2")
    until(lambda: vectors().get(2) == "[0,1,0.5]", lambda: f"{vectors()} {pipeline.tail()}")

    def given_up() -> list[tuple[str]]:
        return pipeline.target.execute("SELECT error FROM cdcsync.pets_backlog WHERE attempts >= 8").fetchall()

    until(lambda: "none of its words" in str(given_up()), lambda: f"{given_up()} {pipeline.tail()}")
    assert pipeline.stop(worker) == 0
