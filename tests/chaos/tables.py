"""The source's tables, the indexes over them, and a writer that changes them in every way, from a seed."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any, LiteralString

import psycopg

Connection = psycopg.Connection[tuple[Any, ...]]

TABLES = """
CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL, body text);
ALTER TABLE articles ALTER body SET STORAGE EXTERNAL;
CREATE TABLE notes (lang text, no int, body text, PRIMARY KEY (lang, no));
ALTER TABLE notes REPLICA IDENTITY FULL;
CREATE TABLE events (id bigint, day int, payload text NOT NULL, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10);
CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (10) TO (20);
CREATE TABLE other (id bigint PRIMARY KEY, what text);
CREATE TABLE authors (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE threads (id int PRIMARY KEY, subject text NOT NULL, score int NOT NULL, closed timestamptz);
CREATE TABLE posts (id bigint PRIMARY KEY,
    thread_id int REFERENCES threads ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    author_id int REFERENCES authors ON DELETE SET NULL, body text NOT NULL, hidden boolean NOT NULL DEFAULT false);
CREATE INDEX ON posts (thread_id);
CREATE INDEX ON posts (author_id);
ALTER TABLE posts REPLICA IDENTITY FULL;
CREATE FUNCTION make_shop(shop text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    EXECUTE format('CREATE SCHEMA %I', shop);
    EXECUTE format('CREATE TABLE %I.items (id int PRIMARY KEY, n int NOT NULL, body text)', shop);
    EXECUTE format('ALTER TABLE %I.items ALTER body SET STORAGE EXTERNAL', shop);
    EXECUTE format('INSERT INTO %I.items SELECT i, i, %L || i FROM generate_series(1, 15) AS i', shop,
        shop || md5(random()::text) || ' has ');
END $$;
CREATE FUNCTION all_items() RETURNS TABLE (source_table text, id int, document text) LANGUAGE plpgsql AS $$
DECLARE shop text; BEGIN
    FOR shop IN SELECT nspname FROM pg_namespace WHERE starts_with(nspname, 'shop_') LOOP
        RETURN QUERY EXECUTE format('SELECT %L, id, concat(''item '', n, '': '', body) FROM %I.items'
            ' WHERE n %% 4 <> 1', shop || '.items', shop);
    END LOOP;
END $$;
SELECT make_shop('shop_' || i) FROM generate_series(1, 3) AS i;
INSERT INTO articles SELECT i, i % 5, 'title ' || i, CASE WHEN i % 4 > 0 THEN
    (SELECT string_agg('first' || i || 'x' || j, ' ') FROM generate_series(1, i % 60) AS j) END
FROM generate_series(1, 80) AS i;
INSERT INTO notes SELECT (ARRAY['de', 'en', 'fr'])[1 + i % 3], i, 'note ' || i FROM generate_series(1, 60) AS i;
INSERT INTO events SELECT i, i % 20, 'event ' || i FROM generate_series(1, 60) AS i;
INSERT INTO authors SELECT i, 'author ' || i FROM generate_series(1, 8) AS i;
INSERT INTO threads SELECT i, 'subject ' || i, i % 5 FROM generate_series(1, 30) AS i;
INSERT INTO posts SELECT i, 1 + i % 30, nullif(i % 9, 0), 'post ' || i, i % 7 = 0 FROM generate_series(1, 90) AS i;
"""

INDEXES = {
    "articles": """
[indexes.articles]
table = "articles"
text = "{title}\\n\\n{body}"
columns = ["tenant"]
embedder = "far"
inline_budget_ms = 20
[indexes.articles.chunking]
max_tokens = 40
overlap_tokens = 0
""",
    "titles": """
[indexes.titles]
table = "articles"
text = "titled: {title}"
columns = ["tenant"]
embedder = "far"
[indexes.titles.chunking]
strategy = "none"
""",
    "notes": """
[indexes.notes]
table = "notes"
text = "{body}"
embedder = "far"
[indexes.notes.chunking]
strategy = "none"
""",
    "events": """
[indexes.events]
table = "events"
text = "on day {day}: {payload}"
embedder = "far"
[indexes.events.chunking]
strategy = "none"
""",
    "shelf": """
[indexes.shelf]
table = "articles"
where = "tenant <> 3"
text = "shelved: {title}"
columns = ["tenant"]
embedder = "far"
[indexes.shelf.chunking]
strategy = "none"
""",
    "items": """
[indexes.items]
tables = ["shop_*.items"]
where = "n % 4 <> 1"
text = "item {n}: {body}"
embedder = "far"
[indexes.items.chunking]
strategy = "none"
""",
    "threads": """
[indexes.threads]
table = "threads"
where = "closed IS NULL AND score % 3 <> 1"
text = "thread: {subject}\\n{posts}"
embedder = "far"
[indexes.threads.chunking]
strategy = "none"
[indexes.threads.related.posts]
table = "posts"
on = { thread_id = "id" }
where = "NOT hidden"
text = "{id} {body} by {author.name}"
order_by = "id"
[indexes.threads.related.posts.related.author]
table = "authors"
on = { id = "author_id" }
""",
}

WISHES = {
    "half precision": 'embedder = "far"\nvector_type = "halfvec"',
    "another distance": 'embedder = "far"\ndistance = "cosine"',
    "another model": 'embedder = "words"',
}
"""What the index `titles` may be migrated to, in place of `FAR`. The provider's numbers fit in half precision; what
another model makes, nobody here can tell, so it does not stay live."""

FAR = 'embedder = "far"'

WHOLE, SMALLER = "max_tokens = 40", "max_tokens = 25"
"""How large the chunks of the index `articles` are, and what they may be migrated to; the documents stay the same."""

OF_ARTICLES = ("articles", "titles", "shelf")
"""The indexes of the table `articles`, all of which carry its column `tenant`."""

MARKED = "xx"
"""The language of notes that the writer leaves alone, but for TRUNCATE."""

RETURNING = ("thread: ",)
"""How texts begin that go and come back, because a condition or a related row says so. They are embedded again."""

DOCUMENTS = {
    "articles": (("id", "tenant"), "SELECT id, tenant, concat(title, E'\\n\\n', body) FROM articles"),
    "titles": (("id", "tenant"), "SELECT id, tenant, concat('titled: ', title) FROM articles"),
    "notes": (("lang", "no"), "SELECT lang, no, body FROM notes"),
    "events": (("id", "day"), "SELECT id, day, concat('on day ', day, ': ', payload) FROM events"),
    "shelf": (("id", "tenant"), "SELECT id, tenant, concat('shelved: ', title) FROM articles WHERE tenant <> 3"),
    "items": (("source_table", "id"), "SELECT * FROM all_items()"),
    "threads": (
        ("id",),
        "SELECT id, concat('thread: ', subject, E'\\n',"
        " (SELECT string_agg(concat(p.id, ' ', p.body, ' by ', a.name), E'\\n'"
        " ORDER BY p.id) FROM posts AS p LEFT JOIN authors AS a ON a.id = p.author_id"
        " WHERE p.thread_id = t.id AND NOT p.hidden)) FROM threads AS t WHERE closed IS NULL AND score % 3 <> 1",
    ),
}
"""Of each index the columns that tell its documents apart (with what is carried), and what they are, in plain SQL."""

PACE_S = 0.01
"""Between two transactions: what a busy application does, and few enough for a history to end soon."""

ALLOWED = 60
"""Transactions for each thing that goes wrong."""

LOCKED_MS = 150
"""A change that meets a row held by an open transaction of the writer gives up after this."""


_PREPARED: LiteralString = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY gid"


def _end_prepared(session: psycopg.Connection[Any], gid: str, way: str) -> None:
    """End a prepared transaction, which the writer's thread and who waits for it may do in the same moment."""
    with contextlib.suppress(psycopg.errors.UndefinedObject, psycopg.errors.ObjectNotInPrerequisiteState):
        session.execute(f"{way} PREPARED '{gid}'")


LARGE = 2_000
"""Characters of a row whose text is stored apart, so that an update of other columns leaves it out."""


class Writer:
    """Changes the tables until told to stop; survives whatever becomes of the server.

    :param connect: opens a session on the source's primary of the moment.
    """

    def __init__(self, seed: int, connect: Callable[[], Connection]) -> None:
        self.chance = random.Random(seed)
        self.committed = 0
        self.kinds: dict[str, int] = {}
        self.returned: list[str] = []
        """The texts of `shelf` that have come back: a condition had excluded them."""
        self.moved: list[str] = []
        """What rows are that were given another key, without white space."""
        self.displaced: list[str] = []
        """What large rows of `articles` were that were given another key, and whose old key another row took then. A
        worker that is behind reads the other row where an update left the large value out, in the moved one's place."""
        self._vacated: dict[int, list[str]] = {}
        """Such rows, by their old keys, until another row takes that."""
        self.undone: list[str] = []
        """What rows were that a large transaction deleted, without white space. Delivered again after a part of it was
        applied, it writes them once more, and deletes them again."""
        self._connect = connect
        self._session: Connection | None = None
        self._number = 0
        self._left = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def allow(self, transactions: int = ALLOWED) -> None:
        """Let so many transactions more be written: a history ends on a slow machine too."""
        self._left += transactions

    def start(self) -> None:
        """Write what is allowed in a thread, until `stop`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the transaction at hand and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._session is not None:
            self._session.close()
            self._session = None
        if self.failure is not None:
            raise self.failure

    def finish(self) -> None:
        """End every prepared transaction, one way or the other."""
        with self._connect() as session:
            for (gid,) in session.execute(_PREPARED).fetchall():
                _end_prepared(session, gid, self.chance.choice(("COMMIT", "ROLLBACK")))

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self._left <= 0:
                    self._rest()
                    continue
                try:
                    self.write_one()
                    self._left -= 1
                except psycopg.errors.ReadOnlySqlTransaction:
                    # A standby that is just being promoted: nothing was written.
                    if self._session is not None:
                        self._session.close()
                        self._session = None
                    time.sleep(0.1)
                except (psycopg.OperationalError, psycopg.InterfaceError):
                    # Away, or a row is locked; whether a commit got through, the tables say.
                    if self._session is not None and (self._session.closed or self._session.broken):
                        self._session = None
                        time.sleep(0.1)
                    elif self._session is not None:
                        with contextlib.suppress(psycopg.Error):
                            self._session.rollback()
                    else:
                        time.sleep(0.1)
                except (
                    psycopg.errors.UniqueViolation,
                    psycopg.errors.UndefinedTable,
                    psycopg.errors.UndefinedColumn,
                    psycopg.errors.InvalidSchemaName,
                    psycopg.errors.CheckViolation,
                    psycopg.errors.ForeignKeyViolation,
                ):
                    assert self._session is not None
                    with contextlib.suppress(psycopg.Error):  # away in the same moment: the next one notices
                        self._session.rollback()
                time.sleep(PACE_S)
        except BaseException as error:
            self.failure = error

    def _rest(self) -> None:
        """Leave nothing prepared behind, which a slot that is being created would wait for, until more is allowed."""
        with contextlib.suppress(psycopg.Error):
            self.finish()
        while self._left <= 0 and not self._stop.is_set():
            time.sleep(PACE_S)

    def write_one(self) -> None:
        """Make one transaction of a random kind."""
        if self._session is None:
            self._session = self._connect()
            self._session.execute(f"SET lock_timeout = {LOCKED_MS}")
        session, chance = self._session, self.chance
        kind = chance.choices(
            ["small", "streamed", "prepared", "resolved", "truncated", "other"], [80, 3, 2, 10, 0.5, 4]
        )[0]
        match kind:
            case "small":
                with session.transaction():
                    for _ in range(chance.randint(1, 5)):
                        self._change(session)
            case "streamed":
                self._streamed(session)
            case "prepared":
                self._number += 1
                session.execute("BEGIN")
                self._change(session)
                session.execute(f"PREPARE TRANSACTION 'p{self._number}_{chance.randint(0, 10**9)}'")
            case "resolved":
                row = session.execute(_PREPARED).fetchone()
                if row is None:
                    return
                _end_prepared(session, row[0], chance.choice(("COMMIT", "COMMIT", "ROLLBACK")))
            case "truncated":
                session.execute(
                    chance.choice(
                        (
                            *("TRUNCATE articles", "TRUNCATE notes", "TRUNCATE events", "TRUNCATE posts"),
                            "TRUNCATE shop_1.items",
                        )
                    )
                )
            case "other":
                session.execute(
                    "INSERT INTO other VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET what = excluded.what",
                    [chance.randint(1, 9), "x" * chance.randint(1, 200)],
                )
        self.committed += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def text(self, words: int) -> str:
        """Return a text that was never written before."""
        self._number += 1
        tag = f"n{self._number}r{self.chance.randint(0, 10**6)}"
        return " ".join([tag, *(f"{tag}w{word}" for word in range(words))])

    def _change(self, session: Connection) -> None:
        chance = self.chance
        key, lang, day = chance.randint(1, 200), chance.choice(("de", "en", "fr")), chance.randint(0, 19)
        thread, author = chance.randint(1, 40), chance.randint(1, 8)
        items = f"shop_{chance.randint(1, 4)}.items"
        match chance.randint(0, 27):
            case 0 | 1 | 2:
                session.execute(
                    "INSERT INTO articles (id, tenant, title, body) VALUES (%s, %s, %s, %s)"
                    " ON CONFLICT (id) DO UPDATE SET title = excluded.title, body = excluded.body",
                    [key, chance.randint(0, 4), self.text(2), self.text(chance.choice((0, 5, 40, 300)))],
                )
                self.displaced += self._vacated.pop(key, [])
            case 3 | 4:
                counted = session.execute(
                    "UPDATE articles SET tenant = tenant + 1 WHERE id = %s RETURNING tenant, title", [key]
                )
                self.returned += [f"shelved: {title}" for tenant, title in counted.fetchall() if tenant == 4]
            case 5 | 6:
                session.execute("UPDATE articles SET title = %s WHERE id = %s", [self.text(1), key])
            case 7:
                session.execute("DELETE FROM articles WHERE id = %s", [key])
            case 8:
                moved = session.execute(
                    "UPDATE articles SET id = id + 1000 WHERE id = %s"
                    " AND NOT EXISTS (SELECT FROM articles WHERE id = %s)"
                    " RETURNING concat_ws(' ', 'titled:', title, 'shelved:', title, title, body)",
                    [key, key + 1000],
                )
                rows = ["".join(row[0].split()) for row in moved.fetchall()]
                self.moved += rows
                self._vacated[key] = [row for row in rows if len(row) > LARGE]
            case 9 | 10:
                session.execute(
                    "INSERT INTO notes VALUES (%s, %s, %s) ON CONFLICT (lang, no) DO UPDATE SET body = excluded.body",
                    [lang, key % 70, self.text(3) if key % 9 else None],
                )
            case 11:
                moved = session.execute(
                    "UPDATE notes SET no = no + 1000 WHERE lang = %s AND no = %s RETURNING coalesce(body, '')",
                    [lang, key % 70],
                )
                self.moved += ["".join(row[0].split()) for row in moved.fetchall()]
            case 12:
                session.execute("DELETE FROM notes WHERE lang = %s AND no = %s", [lang, key % 70])
            case 13:
                session.execute(
                    "INSERT INTO events VALUES (%s, %s, %s)"
                    " ON CONFLICT (id, day) DO UPDATE SET payload = excluded.payload",
                    [key, day, self.text(1)],
                )
            case 14:
                moved = session.execute(
                    "UPDATE events SET day = (day + 10) %% 20 WHERE id = %s AND day = %s"
                    " RETURNING format('on day %%s: %%s', day, payload)",
                    [key, day],
                )
                self.returned += [row[0] for row in moved.fetchall()]  # the second move brings the first text back
            case 15:
                session.execute("DELETE FROM events WHERE id = %s AND day = %s", [key, day])

            case 16 | 17:
                session.execute(
                    "INSERT INTO posts VALUES (%s, %s, %s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                    [key, thread, author, self.text(2)],
                )
            case 18:
                session.execute("UPDATE posts SET thread_id = %s WHERE id = %s", [thread, key])
            case 19:
                session.execute("UPDATE posts SET hidden = NOT hidden, id = id + 1000 WHERE id = %s", [key])
            case 20:
                session.execute("UPDATE authors SET name = %s WHERE id = %s", [self.text(0), author])
            case 21:
                session.execute(
                    "UPDATE threads SET score = score + 1, subject = %s WHERE id = %s", [self.text(1), thread]
                )
            case 22:
                session.execute(
                    "UPDATE threads SET closed = CASE WHEN closed IS NULL THEN now() END WHERE id = %s", [thread]
                )
            case 23:
                # The parent comes after its rows, and goes with them.
                session.execute("DELETE FROM threads WHERE id = %s", [thread])
                session.execute(
                    "INSERT INTO posts VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                    [3000 + key, thread, author, self.text(1)],
                )
                session.execute("INSERT INTO threads VALUES (%s, %s, %s)", [thread, self.text(1), chance.randint(0, 4)])
            case 24 | 25:
                session.execute(
                    f"INSERT INTO {items} VALUES (%s, %s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                    [key % 40, chance.randint(0, 9), self.text(chance.choice((1, 300)))],
                )
            case 26:
                session.execute(
                    f"UPDATE {items} SET n = n + 1, id = id + %s WHERE id = %s", [1000 * (key % 2), key % 40]
                )
            case 27:
                session.execute(f"DELETE FROM {items} WHERE id = %s", [key % 40])

    def _streamed(self, session: Connection) -> None:
        """Write more than the server keeps in memory, with parts that are taken back."""
        chance = self.chance
        with session.transaction():
            for part in range(chance.randint(2, 4)):
                session.execute("SAVEPOINT part")
                low = 2000 + 100 * part
                session.execute(
                    "INSERT INTO articles (id, tenant, title, body)"
                    " SELECT i, %s, %s || i,"
                    " (SELECT string_agg(%s || i || 'x' || j, ' ') FROM generate_series(1, 40) AS j)"
                    " FROM generate_series(%s::int, %s::int) AS i"
                    " ON CONFLICT (id) DO UPDATE SET title = excluded.title, tenant = excluded.tenant",
                    [chance.randint(0, 9), self.text(0), self.text(0), low, low + chance.randint(5, 90)],
                )
                if chance.random() < 0.3:
                    gone = session.execute(
                        "DELETE FROM articles WHERE id BETWEEN %s AND %s"
                        " RETURNING concat_ws(' ', 'titled:', title, 'shelved:', title, title, body)",
                        [low, low + 10],
                    )
                    self.undone += ["".join(row[0].split()) for row in gone.fetchall()]
                if chance.random() < 0.4:
                    session.execute("ROLLBACK TO part")
            if chance.random() < 0.2:
                raise psycopg.Rollback
