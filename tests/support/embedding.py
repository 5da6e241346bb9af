"""Embedding to the end: suspects included, as the embed loop asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from cdcsync.flows.embed.calls import Made
from cdcsync.flows.embed.dispatcher import Dispatcher


async def embedded(dispatcher: Dispatcher, texts: Mapping[bytes, str]) -> Made:
    """Return what becomes of each text, once it is embedded or at fault.

    :raises EmbedderUnavailable: the embedder fails as a whole.
    """
    made = await dispatcher.embed(texts)
    while rest := {one: text for one, text in texts.items() if one not in made.vectors and one not in made.failed}:
        # Those that were asked for last come last: small parts of all calls that failed come first.
        call = dispatcher.suspects.together(rest)
        async with contextlib.aclosing(dispatcher.parts(call, apart=True)) as parts:
            async for part in parts:
                made.vectors.update(part.vectors)
                made.failed.update(part.failed)
        texts = {**{one: text for one, text in rest.items() if one not in call}, **call}
    return made
