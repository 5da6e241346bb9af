"""Cutting documents into chunks that an embedding model reads whole.

What every strategy but `none` promises, where no function of the user's cuts and nothing is repeated in each chunk
(promise 1 holds always):

1. No chunk is longer than the model reads, so that no text is silently left out of its vector.
2. Chunks are trimmed, never empty, in the document's order, and together hold every character but white space. The
   same document always gives the same chunks.
3. A document within the capacity is one chunk, equal to the trimmed document.

Sizes are tokens of the model's own tokenizer, without the special tokens that the model adds. Where there is no
tokenizer, and always for the strategy `characters`, a token is taken as `CHARACTERS_PER_TOKEN` characters; there,
promise 1 holds as far as the model's tokenizer is known.

Boundaries are found by semantic-text-splitter: Unicode sentences, words and graphemes, and Markdown's structure. The
strategy `code` needs no grammar, so it works for any language: it ranks line breaks by blank lines and indentation and
cuts at the highest ranks that fit. `none` makes one chunk of a document, however long: the model then sees only as
much of it as it reads.

    sizes       how long a text is, in tokens or characters; proofs of shortness that spare tokenising
    lengths     how many tokens texts have
    outline     code between whose blocks to cut
    framing     chunks that all repeat a line
    chunker     the strategies: `Chunk`, `Chunker`, `make_chunker`

Code outside this package imports from here. A file in it imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.documents.chunks.chunker import Chunk, Chunker, make_chunker
from cdcsync.documents.chunks.lengths import Lengths, estimate
from cdcsync.documents.chunks.sizes import CHARACTERS_PER_TOKEN, WHITE_SPACE

__all__ = ["CHARACTERS_PER_TOKEN", "WHITE_SPACE", "Chunk", "Chunker", "Lengths", "estimate", "make_chunker"]
