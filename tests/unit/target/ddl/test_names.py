"""The names of an index's relations."""

from __future__ import annotations

from itertools import chain

from cdcsync.config.names import MAX_NAME_BYTES
from cdcsync.target.ddl.names import FRESH, SETTLED, Names, b_tree_name


def test_no_two_relations_of_an_index_have_one_name() -> None:
    names = Names("s", "articles")
    of_generation = [
        [
            *(one.as_string().split(".")[1].strip('"') for one in (names.vectors(at), *names.tiers(at).values())),
            names.rebuild_name(at),
            *(names.key_name(at, tier) for tier in (FRESH, SETTLED)),
            *(names.hash_name(at, tier) for tier in (FRESH, SETTLED)),
            names.near_name(at),
            names.hnsw_name(at),
        ]
        for at in (1, 2, 12)
    ]
    found = [*chain.from_iterable(of_generation), names.search_name, b_tree_name("articles", "tenant")]
    assert len(set(found)) == len(found)
    assert all(name.startswith("articles_") for name in found)


def test_tiers_are_named_in_the_order_in_which_they_are_locked() -> None:
    assert list(Names("s", "articles").tiers(1)) == [FRESH, SETTLED]


def test_the_name_of_a_b_tree_fits_and_differs_where_columns_differ_only_at_their_end() -> None:
    long = "ü" * 30
    names = [b_tree_name("articles", long + end) for end in ("a", "b")]
    assert names[0] != names[1]
    assert all(len(name.encode()) <= MAX_NAME_BYTES for name in names)
    assert b_tree_name("articles", "tenant") == "articles_chunks_by_tenant"
