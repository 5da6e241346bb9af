"""Histories of the pure floors: a schedule from a seed, run step by step, compared at the end, and made smaller.

Each step draws from a generator of its own, so that leaving a step out does not change the others.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

from cdcsync.errors import LeaseLost, TargetRewound
from cdcsync.lsn import Lsn
from tests.simulation.source import Open, Source
from tests.simulation.worker import REMEMBERED, Target, Worker, Wrong

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
    "lose session": 1,
    "go back": 1.5,
    "overtake": 1,
    "thaw": 2,
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
        history.close()
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
        self.target.ask(orphans=self.chance.random() < 0.3)  # with the index, before there is a checkpoint
        self.worker = Worker(self.source, self.target, self.chance)
        self.frozen: Worker | None = None
        """A worker that stands still, and that another one has taken over from since."""
        self.source.sent = self.source.lsn  # a standby without all of this has nothing set up, which is begun anew

    def close(self) -> None:
        self.worker.close()
        if self.frozen is not None:
            self.frozen.close()

    def step(self, number: int, name: str) -> None:
        self.chance.seed(self.seed * 100_003 + number)
        with self._as_the_last_worker():
            self._step(name)

    @contextlib.contextmanager
    def _as_the_last_worker(self) -> Iterator[None]:
        """See that the worker that began last is refused only if the target went back; another one begins then."""
        try:
            yield
        except TargetRewound as error:
            if not self.target.went_back:
                raise Wrong(f"a target that did not go back is said to have: {error}") from error
            self._begin_anew()
        except LeaseLost as error:
            raise Wrong(f"nobody has taken over, and the worker is told so: {error}") from error

    def _begin_anew(self) -> None:
        self.worker.close()
        self.worker = Worker(self.source, self.target, self.chance)

    def _forget_frozen(self) -> None:
        """Have the worker that stands still end with its sessions."""
        if self.frozen is not None:
            self.frozen.close()
            self.frozen = None

    def _thaw(self) -> None:
        """See that a worker that was overtaken commits nothing and says why."""
        if (frozen := self.frozen) is None:
            return
        before = self.target.now
        try:
            frozen.thaw()
        except LeaseLost:
            pass
        except TargetRewound as error:
            raise Wrong(f"a worker that was overtaken is told that the target went back: {error}") from error
        if self.target.now is not before:
            raise Wrong("a worker that was overtaken has committed")
        self._forget_frozen()

    def _step(self, name: str) -> None:
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
                self._begin_anew()
            case "promote":
                if self.target.server is not None:
                    self._forget_frozen()
                    self._promote()
                    self._begin_anew()
            case "lose session":
                worker.lose_session()
            case "go back":
                if self.target.server is None:
                    self._forget_frozen()
                    self.target.go_back(self.chance.randint(0, REMEMBERED))
                    worker.lose_session()
            case "overtake":
                self._forget_frozen()
                self.frozen, worker.slot = worker, None
                if self.chance.random() < 0.5:
                    worker.lose_session()
                self.worker = Worker(source, self.target, self.chance)
            case "thaw":
                self._thaw()

    def _promote(self) -> None:
        self.target.promote(self.source.promote())
        checkpoint = self.target.now.checkpoint
        if self.source.flushed > (checkpoint or 0):
            raise Wrong(f"{Lsn(self.source.flushed)} was acknowledged, and the standby's checkpoint is {checkpoint}")

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
        self._thaw()
        source.emit("heartbeat")  # whose commit in the target tells whether that went back
        for _ in range(2_000):
            source.settle()
            moved = True
            with self._as_the_last_worker():
                moved = self.worker.receive()
                moved = self.worker.apply() or moved
                moved = self.worker.page() or moved
            if not moved and target.now.phase == "done":
                break
        else:
            raise Wrong(f"it does not come to an end: phase {target.now.phase}")
        self.worker.acknowledge()
        found = {key[0]: row for key, row in target.now.rows.items()}
        if found != source.rows:
            wrong = sorted(key for key in found.keys() | source.rows.keys() if found.get(key) != source.rows.get(key))
            raise Wrong(
                f"{wrong[0]} is {found.get(wrong[0])} in the target and {source.rows.get(wrong[0])} in the source"
            )
