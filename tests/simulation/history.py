"""Histories of the pure floors: a schedule from a seed, run step by step, compared at the end, and made smaller.

Each step draws from a generator of its own, so that leaving a step out does not change the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from cdcsync.lsn import Lsn
from tests.simulation.source import Open, Source
from tests.simulation.worker import Target, Worker, Wrong

WEIGHTS = {
    "begin": 7,
    "write": 26,
    "commit": 12,
    "roll back": 2,
    "roll back to": 7,
    "visible": 3,
    "stream": 12,
    "receive": 34,
    "apply": 20,
    "acknowledge": 8,
    "page": 18,
    "ask": 5,
    "prune": 2,
    "reconnect": 2,
    "kill": 1.5,
    "promote": 1,
}
"""How often each kind of step comes."""

STEPS = 140

Step = tuple[int, str]


def schedule(seed: int, steps: int = STEPS) -> list[Step]:
    """Return the steps of a seed."""
    chance = random.Random(seed)
    return list(enumerate(chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps)))


def run(seed: int, steps: Sequence[Step]) -> str | None:
    """Run a history and return what is wrong, None if all is well."""
    history = _History(seed)
    try:
        for number, name in steps:
            history.step(number, name)
        history.finish()
    except Exception as error:  # whatever is raised, the property did not hold
        return f"{type(error).__name__}: {error}"
    finally:
        history.worker.close()
    return None


def shrink(seed: int, steps: Sequence[Step]) -> list[Step]:
    """Return steps that fail as well, none of which can be left out alone."""
    left = list(steps)
    size = len(left) // 2
    while size:
        place = 0
        while place < len(left):
            without = left[:place] + left[place + size :]
            if run(seed, without) is not None:
                left = without
            else:
                place += size
        size //= 2
    return left


class _History:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.source = Source(self.chance)
        self.target = Target(self.source if self.chance.random() < 0.3 else None)
        for _ in range(self.chance.randint(0, 6)):
            one = self.source.begin()
            self.source.write(one)
            self.source.commit(one)
        self.worker = Worker(self.source, self.target, self.chance)
        self.worker.ask()
        self.source.sent = self.source.lsn  # a standby without all of this has nothing set up, which is begun anew

    def step(self, number: int, name: str) -> None:
        self.chance.seed(self.seed * 100_003 + number)
        source, worker = self.source, self.worker
        one = self.chance.choice(source.open) if source.open else None
        match name:
            case "begin":
                if len(source.open) < 3:
                    source.begin()
            case "write":
                source.write(one or source.begin())
            case "commit":
                if one is not None:
                    source.commit(one)
            case "roll back":
                if one is not None and worker.between_blocks:
                    self._aborted(one, None)
                    source.roll_back(one)
            case "roll back to":
                if one is not None and worker.between_blocks:
                    self._aborted(one, source.roll_back_to(one))
            case "visible":
                if source.invisible:
                    source.invisible.discard(min(source.invisible))
            case "stream":
                if one is not None and worker.between_blocks and worker.slot is not None:
                    worker.open_block(worker.slot.stream(one))
            case "receive":
                for _ in range(self.chance.randint(1, 4)):
                    worker.receive()
            case "apply":
                worker.apply()
            case "acknowledge":
                worker.acknowledge()
            case "page":
                worker.page()
            case "ask":
                worker.ask()
            case "prune":
                worker.prune()
            case "reconnect":
                worker.connect()
            case "kill":
                worker.close()
                self.worker = Worker(source, self.target, self.chance)
            case "promote":
                if self.target.server is not None:
                    worker.close()
                    self._promote()
                    self.worker = Worker(source, self.target, self.chance)

    def _promote(self) -> None:
        self.target.promote(self.source.promote())
        if self.source.flushed > (self.target.checkpoint or 0):
            raise Wrong(
                f"{Lsn(self.source.flushed)} was acknowledged, and the standby's checkpoint is {self.target.checkpoint}"
            )

    def _aborted(self, one: Open, undone: list[int] | None) -> None:
        assert self.worker.slot is not None
        for message in self.worker.slot.aborted(one, undone):
            self.worker.take(0, message)

    def finish(self) -> None:
        """End everything and compare.

        :raises Wrong: the target differs from the source.
        """
        self.chance.seed(self.seed)
        source, target = self.source, self.target
        for one in list(source.open):
            source.commit(one)
        source.settle()
        for _ in range(2_000):
            moved = self.worker.receive()
            moved = self.worker.apply() or moved
            moved = self.worker.page() or moved
            if not moved and target.phase == "done":
                break
        else:
            raise Wrong(f"it does not come to an end: phase {target.phase}")
        self.worker.acknowledge()
        found = {key[0]: row for key, row in target.rows.items()}
        if found != source.rows:
            wrong = sorted(key for key in found.keys() | source.rows.keys() if found.get(key) != source.rows.get(key))
            raise Wrong(
                f"{wrong[0]} is {found.get(wrong[0])} in the target and {source.rows.get(wrong[0])} in the source"
            )
