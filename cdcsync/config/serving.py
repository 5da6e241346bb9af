"""The section of the tool server: who may search what, and how much of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta

from cdcsync.config.shape import Section
from cdcsync.config.values import SHORTEST_S, Address, Dsn, Name, is_loopback, parse_address


class Tenant(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A column that a caller's claim decides: callers find only rows with their value, and never see the column.

    :param column: the carried column, which each index that `serve` offers must have; empty, callers see all rows.
    :param claim: the claim of the caller's token that holds the value.
    """

    column: Name | None
    """Without a default, so that a section which names only the claim does not show every row to every caller."""
    claim: str = "tenant"


class Serve(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The tool server, `cdcsync serve`.

    :param listen: host:port of the HTTP API, MCP, /livez, /readyz, /metrics and the search page; port 0 takes any.
    :param hosts: names by which a proxy on this machine may ask while `listen` is loopback, besides localhost.
    :param dsn: connection string of the target for searches; left out, it is target.dsn. Use a role that only reads.
    :param role: the name of that role. With a tenant, row-level security holds it to its callers' rows.
    :param indexes: the indexes to offer; left out, all.
    :param tokens_file: the file of bearer tokens, as `cdcsync token new` writes it. It is read again when it changes.
    :param jwks: where the keys of signed tokens (JWT) are: an https:// address or a file.
    :param issuer: the issuer (`iss`) that signed tokens must name.
    :param audience: the audience (`aud`) that signed tokens must name.
    :param anonymous: answer callers without a token. Only on loopback, and without a tenant.
    :param tenant: the column that a caller's claim decides.
    :param connections: searches that run at the same time, of all callers.
    :param waiting: searches that may wait for a connection; beyond it callers are told to come back.
    :param max_k: the most hits of one search.
    :param max_query_characters: the longest query.
    :param max_body_bytes: the largest request.
    :param deadline_s: how long one call may take.
    :param requests_per_s: calls a second of one tenant, or of one subject where there is no tenant.
    :param burst: calls that it may make at once before that.
    :param concurrency: calls of one tenant that run at the same time.
    :param answer_tokens: the most tokens of text in one answer to an agent; the answer says if it was cut.
    :param tokens_per_day: the most tokens of text that one tenant is answered with a day, by each replica; 0 for any.
    :param cors_origins: origins of web pages that may call the API from a browser.
    :param audit_days: how long the record of each call is kept; 0 keeps none, and deletes those that are there.
    :param audit_queries: keep the text of queries too, not only its hash.
    """

    listen: Address = "127.0.0.1:9478"
    hosts: tuple[str, ...] = ()
    dsn: Dsn = ""
    role: Name | None = None
    indexes: tuple[str, ...] = ()
    tokens_file: str | None = None
    jwks: str | None = None
    issuer: str | None = None
    audience: str | None = None
    anonymous: bool = False
    tenant: Tenant = Tenant(column=None)
    connections: Annotated[int, Meta(ge=1, le=1_000)] = 8
    waiting: Annotated[int, Meta(ge=0, le=100_000)] = 64
    max_k: Annotated[int, Meta(ge=1, le=1_000)] = 50
    max_query_characters: Annotated[int, Meta(ge=1, le=100_000)] = 4_000
    max_body_bytes: Annotated[int, Meta(ge=1_000, le=10**8)] = 65_536
    deadline_s: Annotated[float, Meta(ge=SHORTEST_S, le=600)] = 10.0
    requests_per_s: Annotated[float, Meta(gt=0, le=10**6)] = 20.0
    burst: Annotated[int, Meta(ge=1, le=10**6)] = 40
    concurrency: Annotated[int, Meta(ge=1, le=10_000)] = 4
    answer_tokens: Annotated[int, Meta(ge=100, le=10**6)] = 6_000
    tokens_per_day: Annotated[int, Meta(ge=0, le=10**12)] = 0
    cors_origins: tuple[str, ...] = ()
    audit_days: Annotated[int, Meta(ge=0, le=3_650)] = 30
    audit_queries: bool = False

    @property
    def listen_address(self) -> tuple[str, int]:
        """The host and port to listen on.

        :raises ConfigError: `listen` is not an address; one that was read from a file is.
        """
        return parse_address(self.listen)

    def faults(self) -> Iterator[tuple[str, str]]:
        """Report settings that would let anybody in, or keep everybody out."""
        if self.jwks is not None and (self.issuer is None or self.audience is None):
            yield "jwks", "needs issuer and audience: a token that was made for another service must not be accepted"
        if self.jwks is not None and self.jwks.startswith("http://"):
            yield "jwks", "must be an https:// address or a file: a server that answers in its place could sign tokens"
        if self.anonymous and not is_loopback(self.listen_address[0]):
            yield "anonymous", "is for loopback only; give callers tokens (`cdcsync token new`)"
        if self.anonymous and self.tenant.column is not None:
            yield "anonymous", "cannot be combined with a tenant: a caller without a token has no claim"
