"""Which tables with new files were emptied by a TRUNCATE that the stream has brought: their rows need no comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cdcsync.lsn import Lsn
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Session
from cdcsync.source.catalog import insert_lsn
from cdcsync.source.fingerprints import Emptied


class Truncations:
    """Explains new files of the tables of a pipeline's indexes."""

    def __init__(self, deliveries: Mapping[str, Deliveries], received: Callable[[], Lsn]) -> None:
        """Explain by what the stream has brought.

        :param deliveries: what the stream has delivered for each index.
        :param received: says how far the stream has been received.
        """
        self._deliveries = deliveries
        self._received = received
        self._awaited: dict[tuple[str, int | None], tuple[int, Lsn]] = {}
        """By index, and the place of a related table's link or None: the transaction that rewrote the table, and from
        where in the stream on that has come if it was a TRUNCATE."""

    @property
    def awaited(self) -> bool:
        """Whether the stream may still bring a TRUNCATE that explains what was seen."""
        return bool(self._awaited)

    def forget(self, index: str) -> None:
        """Await nothing more for an index."""
        self._awaited = {of: awaited for of, awaited in self._awaited.items() if of[0] != index}

    async def explain(self, source: Session, spec: IndexSpec, emptied: Emptied) -> bool | None:
        """Say whether a TRUNCATE that the stream has brought made a table's new files; None if it may still come."""
        writer, deliveries = emptied.by, self._deliveries[spec.name]
        # The same table by another link is truncated in the same message.
        links = {link.table: link.place for link in spec.links}
        place = None if emptied.table == spec.shape.table else links[emptied.table]
        if deliveries.emptied_by(writer, place) and not emptied.at_its_end:
            return True
        of = spec.name, place
        awaited = self._awaited.get(of)
        if awaited is None or (awaited[0] != writer and deliveries.emptied_by(awaited[0], place)):
            with speaking_of("source"):
                awaited = self._awaited[of] = writer, await insert_lsn(await source.connection())
        if self._received() <= awaited[1]:
            return None
        return awaited[0] == writer and deliveries.emptied_by(writer, place, at_its_end=emptied.at_its_end)
