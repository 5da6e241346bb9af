"""One database with tables of every kind, and the publications that send them."""

from __future__ import annotations

from cdcsync.config import QualifiedName
from cdcsync.postgres.sessions import Connection

T = QualifiedName("public", "t")

P = QualifiedName("public", "p")

LAYOUT = """
    DROP SCHEMA IF EXISTS public CASCADE; DROP SCHEMA IF EXISTS other CASCADE; DROP PUBLICATION IF EXISTS p;
    CREATE SCHEMA public; CREATE SCHEMA other; CREATE SCHEMA IF NOT EXISTS attic;
    CREATE TYPE public.mood AS ENUM ('sad', 'ok', 'happy');
    CREATE TYPE public.inner_point AS (x int, y int);
    CREATE TYPE public.point3 AS (at public.inner_point, z int);
    CREATE DOMAIN public.short AS varchar(10);
    CREATE TYPE public.days AS RANGE (subtype = date);
    CREATE TABLE public.t (id int PRIMARY KEY, title text, mood public.mood, spot public.point3, more public.short,
        days public.days, moods public.mood[], extra text, twice int GENERATED ALWAYS AS (id * 2) STORED);
    CREATE TABLE public.nothing ();
    CREATE TABLE public.p (id int, at date, title text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE public.p1 PARTITION OF public.p FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
    CREATE TABLE public.p2 PARTITION OF public.p FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    CREATE TABLE public.apart (id int NOT NULL, at date NOT NULL, title text);
    INSERT INTO public.t (id, title, mood) VALUES (1, 'a', 'sad');
    INSERT INTO public.p VALUES (1, '2025-05-05', 'a');
"""

PUBLICATIONS = {
    "table": "CREATE PUBLICATION p FOR TABLE public.t, public.p WITH (publish_via_partition_root = true)",
    "all": "CREATE PUBLICATION p FOR ALL TABLES WITH (publish_via_partition_root = true)",
    "schema": "CREATE PUBLICATION p FOR TABLES IN SCHEMA public WITH (publish_via_partition_root = true)",
}


async def lay_out(source: Connection, publication: str = "table") -> None:
    await source.execute(LAYOUT)
    await source.execute(PUBLICATIONS[publication])
