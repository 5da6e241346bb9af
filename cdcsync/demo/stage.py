"""The acts of the demo, on a stage that has been set: a worker runs, and follows a table."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import anyio
import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cdcsync.config import Config
from cdcsync.demo.corpus import Entry
from cdcsync.demo.judged import summaries
from cdcsync.demo.material import CHANGES, QUESTIONS, read_entries, text_of
from cdcsync.embedders import Embedder, make_embedder
from cdcsync.flows.evaluate.judged import Searches, embed_questions, evaluate_judged
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target.search import Hit, Mode, search, stored_spec
from cdcsync.worker.state import WorkerState

POLL_S = 0.005
"""How often a change is looked for: what is measured is too long by at most this and a query."""

PATIENCE_S = 60.0
"""A change that is not searchable by then never will be; on a slow machine it takes a second."""

SINGLE_INSERTS = 20
"""Inserts one after the other: enough for a median."""


OTHER_COLUMNS = 58
"""Characters that the columns of the table of changes take, but for the last."""


class Stage:
    """Shared by the acts: a running worker, and a session on its database."""

    def __init__(
        self,
        console: Console,
        config: Config,
        config_path: Path,
        connection: Connection,
        state: WorkerState,
        rows: int,
    ) -> None:
        self._console = console
        self._config = config
        self._config_path = config_path
        self._connection = connection
        self._handle = state
        self._rows = rows
        self._embedder: Embedder = make_embedder("minilm", config.embedders["minilm"])
        self._spec: IndexSpec | None = None

    async def load(self) -> None:
        """Follow the first load to its end, and open the model for queries."""
        started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            read = progress.add_task("rows read", total=self._rows)
            made = progress.add_task("loading the model", total=self._rows)
            while True:
                index = (await self._handle.status()).indexes["docs"]
                progress.update(read, completed=index.documents or 0)
                if index.vectors:
                    progress.update(made, description="vectors made", completed=index.vectors, total=index.chunks)
                if index.state == "live" and index.backlog == 0:
                    break
                await anyio.sleep(0.2)
        elapsed = time.monotonic() - started
        self._console.print(
            f"{index.chunks:,} chunks are embedded and indexed, {elapsed:.0f} s with the loading of the model"
        )
        with self._console.status("loading the model again, for queries …"):
            await self._embedder.open()
        self._spec = await stored_spec(
            self._connection, self._config.target.schema, "docs", self._config.indexes["docs"]
        )

    async def ask_all(self) -> None:
        """Answer the questions."""
        for question in QUESTIONS:
            self._console.print(f"\n[bold]search:[/] {question}")
            for hit in await self._search(question, k=3):
                summary = hit.content.partition("\n\n")[2].strip().partition("\n")[0]
                line = Text.assemble("   ", (_name(hit), "cyan"), "  ", summary)
                self._console.print(line, overflow="ellipsis", no_wrap=True)

    async def change_all(self) -> None:
        """Make the changes, one after the other, and show when and how searches follow."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("change, search", no_wrap=True)
        for heading in ("words", "meaning", "embedded"):
            table.add_column(heading, justify="right", no_wrap=True)
        # The width that the other columns leave: rich would make all columns narrower alike.
        table.add_column(
            "best by meaning before, after", no_wrap=True, max_width=max(20, self._console.width - OTHER_COLUMNS)
        )
        for change in CHANGES:
            (before, *_) = await self._search(change.question, k=1, mode="vector")
            texts = self._embedded_texts()
            text_s, vector_s = await self._make(change.before, change.after)
            texts = self._embedded_texts() - texts
            (after, *_) = await self._search(change.question, k=1, mode="vector")
            table.add_row(
                Text.assemble((change.title, "bold"), f"\n  {change.question}"),
                _milliseconds(text_s),
                _milliseconds(vector_s),
                f"{texts:.0f}",
                Text.assemble(_name(before), "\n", (_name(after), "cyan")),
            )
        self._console.print("\nChanges: how soon after the commit searches by words and by meaning follow")
        self._console.print(table)

    async def insert_singly(self) -> None:
        """Insert rows one by one and show the spread of the times."""
        texts, vectors = [], []
        for number in range(SINGLE_INSERTS):
            entry = Entry("demo.single", f"row_{number}", "row()", f"The row with the number {number} of the demo.")
            text_s, vector_s = await self._make(None, entry)
            texts.append(text_s)
            vectors.append(vector_s)
        self._console.print(
            f"{SINGLE_INSERTS} more inserts, one by one, from commit to searchable:\n"
            f"  by words    {_milliseconds(statistics.median(texts))} (slowest {_milliseconds(max(texts))})\n"
            f"  by meaning  {_milliseconds(statistics.median(vectors))} (slowest {_milliseconds(max(vectors))})"
        )

    async def judge(self) -> None:
        """Answer questions with known answers in every mode, and show how well."""
        assert self._spec is not None
        collection = summaries(read_entries(self._rows))
        schema = self._config.target.schema
        with self._console.status("answering questions with known answers …"):
            vectors = await embed_questions(self._embedder, collection.queries)
            searches = Searches(self._connection, schema, self._spec, collection, vectors, None)
            run = await evaluate_judged("docs", self._spec.generation, collection, searches.modes())
        self._console.print(
            f"\nJudged: {run.queries} first lines of docstrings, each to find its entry (cdcsync evaluate --judged)"
        )
        for mode, one in run.modes.items():
            figure = one.figures["nDCG@10"]
            ends = "" if figure.interval is None else " (95 %: {:.3f} to {:.3f})".format(*figure.interval)
            self._console.print(f"  {mode:<8} nDCG@10 {figure.mean:.3f}{ends}  {one.mean_ms:.1f} ms a search")

    def say_how_to_look_around(self) -> None:
        """Print where everything is."""
        self._console.print(
            f"\nThe worker runs until Ctrl-C. The worker's page: http://127.0.0.1:{self._handle.port}/\n"
            f"  psql {self._config.source.dsn}\n"
            f"  cdcsync status --watch -c {self._config_path}\n"
            f"  cdcsync search docs 'pick a winner' -c {self._config_path}",
            soft_wrap=True,
        )

    async def _search(self, question: str, *, k: int, mode: Mode = "hybrid") -> list[Hit]:
        assert self._spec is not None
        (vector,) = await self._embedder.embed([question], kind="query")
        schema = self._config.target.schema
        return await search(self._connection, schema, self._spec, text=question, vector=vector, k=k, mode=mode)

    async def _make(self, before: Entry | None, after: Entry | None) -> tuple[float, float]:
        """Make a change; return the seconds from commit until words, and until vectors, find just what is there now."""
        key = [] if before is None else [before.module, before.name]
        values = [] if after is None else list(msgspec.structs.astuple(after))
        if after is None:
            statement = "DELETE FROM public.docs WHERE (module, name) = (%s, %s)"
        elif before is None:
            statement = "INSERT INTO public.docs VALUES (%s, %s, %s, %s)"
        else:
            statement = (
                "UPDATE public.docs SET (module, name, signature, doc) = (%s, %s, %s, %s)"
                " WHERE (module, name) = (%s, %s)"
            )
        expected = set() if after is None else {(after.module, after.name, text_of(after))}
        keys = [entry for entry in (before, after) if entry is not None]
        arguments = [[entry.module for entry in keys], [entry.name for entry in keys]]
        text_s = None
        with speaking_of("source", where="the demo's server"), anyio.fail_after(PATIENCE_S):
            await self._connection.execute(statement, values + key)
            committed = time.perf_counter()
            while True:
                cursor = await self._connection.execute(_FOUND, arguments * 2)
                rows = await cursor.fetchall()
                if text_s is None and {row[1:] for row in rows if row[0] == "text"} == expected:
                    text_s = time.perf_counter() - committed
                if text_s is not None and {row[1:] for row in rows if row[0] == "vector"} == expected:
                    return text_s, time.perf_counter() - committed
                await anyio.sleep(POLL_S)

    def _embedded_texts(self) -> float:
        """Return how many texts the worker has given to the model so far."""
        labels = {"embedder": self._embedder.name}
        return self._handle.metrics.registry.get_sample_value("cdcsync_embed_texts_total", labels) or 0.0


_FOUND = """
    SELECT 'text', c.module, c.name, c.content FROM cdcsync.docs_chunks AS c
    JOIN unnest(%s::text[], %s::text[]) AS k(module, name) USING (module, name)
    UNION
    SELECT CASE WHEN i.stale THEN 'stale' ELSE 'vector' END, i.module, i.name, i.content FROM public.docs_index AS i
    JOIN unnest(%s::text[], %s::text[]) AS k(module, name) USING (module, name)
"""
"""The index's contents under some keys: the chunks, which searches by words read, and the view, with the vectors."""


def _name(hit: Hit) -> str:
    return f"{hit.key['module']}.{hit.key['name']}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
