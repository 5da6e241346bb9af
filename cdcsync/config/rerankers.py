"""The sections of rerankers: what reads query and text together and orders what a search found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from cdcsync.config.shape import Section
from cdcsync.config.values import ApiKey, Header, HeaderName, Seconds, Text, Url

Candidates = Annotated[int, Meta(ge=1, le=1_000)]


class SentenceTransformersReranker(
    Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="sentence-transformers"
):
    """A local cross-encoder run by sentence-transformers.

    :param model: the model's name on its hub, or the path of a directory that holds it.
    :param revision: the hub's commit, branch or tag; without one, the newest that is there.
    :param device: "auto" picks an accelerator when there is one; else a torch device such as "cpu" or "cuda:1".
    :param trust_remote_code: run Python code that comes with the model. It can do what the process can.
    :param batch_size: the most texts in one forward pass.
    :param candidates: how many of a search's hits are ordered anew: more finds better and takes longer.
    """

    model: Text
    revision: Text | None = None
    device: Text = "auto"
    trust_remote_code: bool = False
    batch_size: Annotated[int, Meta(ge=1, le=10_000)] = 32
    candidates: Candidates = 50


class TeiReranker(Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="tei"):
    """A server of text-embeddings-inference that serves a reranker at `/rerank`.

    :param base_url: where the server is, without `/rerank`.
    :param api_key: the key, sent as bearer token; empty sends none. Keep it out of the file: "${TEI_API_KEY}".
    :param api_key_file: a file that holds the key, read again for each request.
    :param concurrency: requests at the same time, each on a connection that is kept.
    :param batch_texts: the most texts in one request; TEI takes 32 unless it was started otherwise.
    :param timeout_s: seconds that one request may take.
    :param headers: more headers of each request, such as a gateway's; keys among them are never shown.
    :param query: parameters for the address of each request.
    :param candidates: how many of a search's hits are ordered anew: more finds better and takes longer.
    """

    base_url: Url
    api_key: ApiKey = ""
    api_key_file: str = ""
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 4
    batch_texts: Annotated[int, Meta(ge=1, le=10_000)] = 32
    timeout_s: Seconds = 10.0
    headers: dict[HeaderName, Header] = msgspec.field(default_factory=dict)
    query: dict[Text, Text] = msgspec.field(default_factory=dict)
    candidates: Candidates = 50

    def faults(self) -> Iterator[tuple[str, str]]:
        """Two keys would leave open which one is meant."""
        if self.api_key and self.api_key_file:
            yield "api_key_file", "cannot be used together with api_key"


Reranker = SentenceTransformersReranker | TeiReranker
