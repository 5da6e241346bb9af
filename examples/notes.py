"""Documents and chunks made by functions of one's own.

The table holds notes as an application exports them: a title, tags in one text, and a body in which a line of `---`
parts one thought from the next. Tags are worth being found, drafts are not, and a chunk should be one thought:

    [indexes.notes]
    table = "public.notes"
    documents = "notes:document"
    document_columns = ["title", "tags", "body", "draft"]
    chunk_text = "{title}: {chunk}"
    embedder = "minilm"
    [indexes.notes.chunking]
    chunks = "notes:thoughts"

Python finds the module where it is installed, or in a directory that PYTHONPATH names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def document(row: Mapping[str, str | None]) -> str | None:
    """Return the document of a row; drafts have none, and no place in the index."""
    if row["draft"] == "t":
        return None
    tags = [tag.strip() for tag in (row["tags"] or "").split(",") if tag.strip()]
    about = f"About {', '.join(tags)}.\n---\n" if tags else ""
    return about + (row["body"] or "")


def thoughts(text: str) -> list[str]:
    """Return the thoughts that a document consists of."""
    return re.split(r"^---$", text, flags=re.MULTILINE)


# Every change of what these make gets a number. Without one, any change of this file makes all documents anew.
document.version = 1  # type: ignore[attr-defined]
thoughts.version = 1  # type: ignore[attr-defined]
