"""The worker's end of a Ray cluster: what is known without one, and what is said where there is none."""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from cdcsync import __version__
from cdcsync.config import HashEmbedder, PythonEmbedder, RayEmbedder, TeiEmbedder, parse
from cdcsync.embedders import make_embedder
from cdcsync.embedders.ray import Failure, Opening
from cdcsync.embedders.ray_pool import Actor, Pool
from cdcsync.errors import ConfigError, EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from tests import ROOT

PAGE = ROOT / "docs" / "scaling.md"


def test_it_is_known_as_the_embedder_that_its_actors_run() -> None:
    inner = TeiEmbedder(model="m", dimensions=8, base_url="http://127.0.0.1:1", batch_texts=3, max_input_tokens=100)
    plain = make_embedder("plain", inner)
    fleet = make_embedder("fleet", RayEmbedder(embedder=inner, actors_max=5, tasks_in_flight=3))

    assert fleet.identity == plain.identity
    assert (fleet.dimensions, fleet.distance, fleet.max_input_tokens) == (8, "cosine", 100)
    assert fleet.tokenizer_json == plain.tokenizer_json
    assert fleet.fitting(["a"] * 10) == 3
    assert fleet.concurrency == 15


def test_the_example_of_the_documentation_is_right() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    index = '[indexes.a]\ntable = "a"\ntext = "{b}"\nembedder = "fleet"\n'

    fleet = parse(example + index, {}, where="example").embedders["fleet"]

    assert isinstance(fleet, RayEmbedder)
    assert fleet.gpus == 1


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            'address = "ray://head:10001"',
            "embedders.fleet.address: expected host:port of the cluster's head without",
        ),
        ('address = "head"', 'embedders.fleet.address: expected "auto" or host:port'),
        ('address = "head:0"', 'embedders.fleet.address: expected "auto" or host:port'),
        ("actors_min = 3\nactors_max = 2", "embedders.fleet.actors_max: must be at least actors_min (3), got 2"),
        ("tasks_in_flight = 1", "embedders.fleet.tasks_in_flight: expected a whole number of at least 2"),
        ('resources = { a100 = "one" }', "embedders.fleet.resources.a100: expected a number"),
    ],
)
def test_a_wrong_section_is_said_with_its_key(keys: str, problem: str) -> None:
    text = (
        f'[embedders.fleet]\ntype = "ray"\n{keys}\n[embedders.fleet.embedder]\ntype = "hash"\n'
        '[indexes.a]\ntable = "a"\ntext = "{b}"\nembedder = "fleet"\n'
    )
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse(text, {}, where="test")


async def test_it_needs_to_be_opened() -> None:
    with pytest.raises(EmbedderUnavailable, match="not open"):
        await make_embedder("fleet", RayEmbedder(embedder=HashEmbedder())).embed(["a"])


async def test_an_address_where_nothing_answers_is_said_with_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    fleet = make_embedder("fleet", RayEmbedder(embedder=HashEmbedder(), address=f"127.0.0.1:{port}"))

    with pytest.raises(EmbedderUnavailable, match=f"no Ray cluster answers at 127.0.0.1:{port}") as raised:
        await fleet.open()
    assert raised.value.where == "embedders.fleet"
    assert "ray start --address" in (raised.value.hint or "")
    await fleet.aclose()


async def test_a_missing_package_is_said_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Found before any other: a finder that knows of no ray.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'ray' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fleet = make_embedder("fleet", RayEmbedder(embedder=HashEmbedder()))

    with pytest.raises(EmbedderSetupError, match="ray is not installed") as raised:
        await fleet.open()
    assert "cdcsync[ray]" in (raised.value.hint or "")
    await fleet.aclose()


async def test_callers_that_wait_for_one_attempt_share_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio

    starts = 0

    class Refused:
        @classmethod
        async def start(cls, opening: object, where: str) -> None:
            nonlocal starts
            starts += 1
            await anyio.lowlevel.checkpoint()
            raise EmbedderUnavailable("away")

    monkeypatch.setattr("cdcsync.embedders.ray._Driver", Refused)
    fleet = make_embedder("fleet", RayEmbedder(embedder=HashEmbedder()))
    failures = []

    async def one() -> None:
        try:
            await fleet.open()
        except EmbedderUnavailable as error:
            failures.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(one)

    assert len(failures) == 10
    assert starts == 1


@pytest.mark.parametrize(
    "error",
    [
        EmbedderUnavailable("away", hint="wait", retry_after_s=3.0),
        TextRejected("too long", hint="cut it"),
        EmbedderSetupError("no model"),
        EmbedError("failed"),
    ],
)
def test_errors_cross_between_processes_as_what_they_are(error: EmbedError) -> None:
    back = Failure.of(error).error("embedders.fleet")

    assert type(back) is type(error)
    assert (back.message, back.hint, back.where) == (error.message, error.hint, "embedders.fleet")
    assert getattr(back, "retry_after_s", None) == getattr(error, "retry_after_s", None)


class Garbled:
    """An embedder that gives as many numbers as it should, in another shape."""

    identity = "garbled"
    dimensions = 4

    def embed(self, texts: list[str], *, kind: str) -> Any:
        return np.ones((self.dimensions, len(texts)), np.float32)


async def test_an_actor_gives_no_vectors_of_another_shape() -> None:
    settings = PythonEmbedder(class_=f"{__name__}:Garbled")
    actor = Actor("m", msgspec.msgpack.encode(settings))
    assert await actor.open(__version__, "python:garbled") is None

    assert isinstance(await actor.embed("document", list("abcd")), bytes)
    failure = await actor.embed("document", ["a", "b"])

    assert isinstance(failure, Failure)
    assert "shape (4, 2) for 2 texts of 4 dimensions" in failure.message


class _Lost(Exception):
    pass


class _Raised(_Lost):
    cause = ValueError("cannot tokenise 'the secret diary of a patient'")


async def test_what_an_actor_raises_is_not_repeated_if_it_quotes_a_text() -> None:
    raising = SimpleNamespace(
        remote=lambda actor: SimpleNamespace(options=lambda **_: actor),
        exceptions=SimpleNamespace(RayTaskError=_Raised, RayError=_Lost),
    )
    pool = Pool(raising, Opening("m", "python:m", RayEmbedder(embedder=HashEmbedder())), io.BytesIO())

    async def answer() -> None:
        raise _Raised

    failure = await pool._of_actor(answer(), ["the secret diary of a patient"])

    assert "secret" not in failure.message
    assert failure.message.startswith("the embedder failed on an actor: ValueError: ")
