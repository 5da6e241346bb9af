"""Related tables as they are configured: which tables they read, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cdcsync.config import Config, QualifiedName, parse
from cdcsync.errors import ConfigError


def parsed(related: str) -> Config:
    return parse(
        f"""
        [source]
        dsn = "postgresql://localhost/app"
        [embedders.hash]
        type = "hash"
        [indexes.posts]
        table = "posts"
        text = "{{title}}"
        embedder = "hash"
        {related}
        """,
        {},
        where="the test's configuration",
    )


def test_the_tables_of_a_relation_are_those_on_the_way_and_those_within_it() -> None:
    config = parsed("""
        [indexes.posts.related.tags]
        table = "tags"
        on = { id = "tag_id" }
        via = { table = "blog.post_tags", on = { post_id = "id" } }
        [indexes.posts.related.comments]
        table = "comments"
        on = { post_id = "id" }
        related.author = { table = "people", on = { id = "author_id" } }
    """)
    found = {name: one.tables for name, one in config.indexes["posts"].related.items()}
    assert found == {
        "tags": (QualifiedName("blog", "post_tags"), QualifiedName("public", "tags")),
        "comments": (QualifiedName("public", "comments"), QualifiedName("public", "people")),
    }


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        ({"on": "{}"}, "on", "at least one column"),
        ({"via": '{ table = "between", on = {} }'}, "via.on", "at least one column"),
        ({"separator": '"\\u0000"'}, "separator", "zero byte"),
        ({"columns": '["a", "b", "a"]'}, "columns", "'a' is there more than once"),
        ({"limit": "0"}, "limit", "1"),
        ({"sort": '"a"'}, "sort", "sort"),
        ({"related": '{ below = { table = "c", on = {} } }'}, "related.below.on", "at least one column"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_a_relation_that_cannot_be_meant_is_refused_by_its_key(lines: dict[str, Any], where: str, message: str) -> None:
    keys = {"table": '"comments"', "on": '{ post_id = "id" }'} | lines
    with pytest.raises(ConfigError) as caught:
        parsed("[indexes.posts.related.comments]\n" + "\n".join(f"{key} = {value}" for key, value in keys.items()))
    told = str(caught.value)
    assert f"indexes.posts.related.comments.{where}" in told
    assert message in told
