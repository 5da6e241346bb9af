"""An embedder of the user's own: what it needs, what has a default, and what becomes of its mistakes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import anyio
import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders import make_embedder, validate
from cdcsync.embedders.protocol import WORD, harmless
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.flows.embed.health import Health
from tests.unit.config.files import SECTIONS, problems, read

pytestmark = pytest.mark.anyio


class Least:
    """The least that an embedder is."""

    identity = "least:1"
    dimensions = 2

    def embed(self, texts: Sequence[str], *, kind: str) -> list[list[int]]:
        return [[len(text), len(kind)] for text in texts]


class Full:
    """Everything that an embedder may have."""

    identity = "full:1"
    dimensions = 2
    distance = "l2"
    concurrency = 3
    max_input_tokens = 77
    tokenizer_json = "{}"
    calls: ClassVar[list[str]] = []

    def __init__(self, *, scale: float, name: str = "x", loud: bool = False) -> None:
        self.options = (scale, name, loud)

    def fitting(self, texts: Sequence[str]) -> int:
        return 5

    async def open(self) -> None:
        self.calls.append("open")

    async def embed(self, texts: Sequence[str], *, kind: str) -> Any:
        self.calls.append(kind)
        return np.ones((len(texts), 2))

    async def aclose(self) -> None:
        self.calls.append("aclose")


class Failing(Least):
    """Fails as its text says."""

    def embed(self, texts: Sequence[str], *, kind: str) -> Any:
        match texts[0]:
            case "reject":
                raise TextRejected("too rude")
            case "words":
                return "no numbers"
            case "ragged":
                return [[1.0], [1.0, 2.0]]
        raise ValueError(f"secret {texts[0]}")


class Picky(Least):
    """Rejects every text but the one that it names."""

    harmless_text = "λόγος"

    def embed(self, texts: Sequence[str], *, kind: str) -> list[list[int]]:
        if set(texts) != {self.harmless_text}:
            raise TextRejected("not in the file")
        return super().embed(texts, kind=kind)


class Mute(Picky):
    """Rejects what it is tried with, too."""

    harmless_text = WORD

    def embed(self, texts: Sequence[str], *, kind: str) -> list[list[int]]:
        raise TextRejected("not in the file")


class Threaded(Least):
    def embed(self, texts: Sequence[str], *, kind: str) -> Any:
        self.thread = threading.current_thread()
        return super().embed(texts, kind=kind)


def section(name: str, **options: str | float | bool) -> config.PythonEmbedder:
    return config.PythonEmbedder(class_=f"{__name__}:{name}", options=options)


async def test_identity_dimensions_and_embed_are_enough() -> None:
    embedder = make_embedder("mine", section("Least"))
    assert (embedder.name, embedder.identity, embedder.dimensions) == ("mine", "python:least:1", 2)
    assert (embedder.distance, embedder.concurrency, embedder.max_input_tokens) == ("cosine", 1, None)
    assert embedder.tokenizer_json is None
    assert embedder.fitting(["a", "b", "c"]) == 3
    with pytest.raises(EmbedderUnavailable, match="not open"):
        await embedder.embed(["a"])
    await embedder.open()
    vectors = await embedder.embed(["a", "bcd"], kind="query")
    validate(vectors, 2, 2)
    assert vectors.tolist() == [[1, 5], [3, 5]]
    await embedder.aclose()


async def test_what_the_class_says_is_used_and_it_is_opened_and_closed_once() -> None:
    Full.calls.clear()
    embedder = make_embedder("mine", section("Full", scale=2.5, loud=True))
    assert (embedder.distance, embedder.concurrency, embedder.max_input_tokens) == ("l2", 3, 77)
    assert (embedder.tokenizer_json, embedder.fitting(["a"] * 9)) == ("{}", 5)
    await embedder.open()
    await embedder.open()
    validate(await embedder.embed(["a"]), 1, 2)
    await embedder.aclose()
    await embedder.aclose()
    assert Full.calls == ["open", "document", "aclose"]


async def test_a_plain_embed_runs_in_a_thread() -> None:
    embedder = make_embedder("mine", section("Threaded"))
    await embedder.open()
    await embedder.embed(["a"])
    assert embedder._own.thread is not threading.current_thread()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("reject", TextRejected, "too rude"),
        ("words", EmbedError, "returned str, not rows of numbers"),
        ("ragged", EmbedError, "returned list, not rows of numbers"),
        ("anything", EmbedderUnavailable, r"failed with ValueError in test_python.py, line \d+"),
    ],
)
async def test_a_failure_is_one_of_ours_and_quotes_no_text(text: str, error: type[EmbedError], problem: str) -> None:
    embedder = make_embedder("mine", section("Failing"))
    await embedder.open()
    with pytest.raises(error, match=problem) as raised:
        await embedder.embed([text])
    assert "secret" not in str(raised.value)


async def test_a_text_that_is_rejected_stops_no_other_if_the_class_names_one_that_is_not() -> None:
    embedder = make_embedder("mine", config.PythonEmbedder(class_=f"{__name__}:Picky"))
    assert harmless(embedder) == "λόγος"
    health = Health(embedder, anyio.current_time, anyio.CapacityLimiter(1))
    await embedder.open()
    await health.confirm(TextRejected("not in the file"), anyio.current_time())
    assert health.problem is None


async def test_a_class_that_rejects_what_it_is_tried_with_hears_what_to_do() -> None:
    embedder = make_embedder("mine", config.PythonEmbedder(class_=f"{__name__}:Mute"))
    health = Health(embedder, anyio.current_time, anyio.CapacityLimiter(1))
    await embedder.open()
    with pytest.raises(EmbedderUnavailable, match="not in the file"):
        await health.confirm(TextRejected("not in the file"), anyio.current_time())
    assert health.problem is not None
    assert "harmless_text" in str(health.problem.hint)


def broken(**attributes: Any) -> type:
    return type("Broken", (Least,), attributes)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ("no_such_module:Name", "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:Missing", "cannot be imported: AttributeError"),
        (f"{__name__}:SECTIONS", "it is not a class"),
        (f"{__name__}:Full", "failed with TypeError"),
        (broken(identity=None), "it has no identity"),
        (broken(identity=7), "identity is 7"),
        (broken(dimensions="many"), "dimensions is 'many'"),
        (broken(dimensions=16_001), "dimensions is 16001"),
        (broken(concurrency=-1), "concurrency is -1"),
        (broken(harmless_text=7), "harmless_text is 7"),
        (broken(distance="far"), "distance is 'far'"),
        (broken(embed=None), "it has no method embed"),
    ],
)
def test_a_class_that_is_no_embedder_is_refused_with_the_reason(
    made: str | type, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(made, type):
        monkeypatch.setitem(globals(), "Broken", made)
    path = made if isinstance(made, str) else f"{__name__}:Broken"
    with pytest.raises(EmbedderSetupError, match=problem) as refused:
        make_embedder("mine", config.PythonEmbedder(class_=path))
    assert str(refused.value).startswith("embedders.mine")
    assert refused.value.hint


def test_the_section_is_read_checked_and_shown_without_secrets() -> None:
    text = SECTIONS + '[embedders.own]\ntype = "python"\nclass = "a.b:C"\noptions = {n = 1, on = true, api_key = "s3"}'
    found = read(text)
    assert found.embedders["own"] == config.PythonEmbedder(
        class_="a.b:C", options={"n": 1, "on": True, "api_key": "s3"}
    )
    assert 'class = "a.b:C"' in config.render(found)
    assert "s3" not in config.render(found)
    assert 'embedders.own.class: expected a class as "package.module:Name"' in problems(text.replace("a.b:C", "C"))[0]
    assert "options.n: expected a text, number or boolean, got a list" in problems(text.replace("n = 1", "n = [1]"))[0]
    assert "embedders.own.class: is required" in problems(text.replace('class = "a.b:C"', ""))[0]
