"""Errors: the tree in the docstring is the tree of the classes, and each says whether a retry helps."""

from __future__ import annotations

import inspect
import re

import pytest

from cdcsync import errors
from cdcsync.errors import (
    EXIT_FAILED,
    EXIT_WRONG,
    CdcsyncError,
    ConfigError,
    EmbedderUnavailable,
    MalformedMessage,
    Retry,
    RunError,
    SetupError,
    SourceUnavailable,
    leading,
)

CLASSES = [member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, CdcsyncError)]


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """Return the parent and the retry of each class in the docstring's drawing, None where none is drawn."""
    found: dict[str, tuple[str | None, str | None]] = {}
    last_at: dict[int, str] = {}
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r"([ │]*(?:[├└]── | ))([A-Z]\w+)(?: .*?(automatic|operator|never)?)?", line):
            column = len(match[1])
            parents = [last_at[at] for at in sorted(last_at) if at < column]
            found[match[2]] = (parents[-1] if parents else None, match[3])
            last_at[column] = match[2]
    return found


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    parents = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not CdcsyncError}

    assert {name: parent for name, (parent, _) in drawn().items()} == {"CdcsyncError": None, **parents}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_docstring_says_of_each_class_whether_a_retry_helps(cls: type[CdcsyncError]) -> None:
    _, retry = drawn()[cls.__name__]

    assert isinstance(cls.retry, Retry)
    if retry is None:
        # Nothing drawn means the parent's, so the class must not say otherwise.
        assert cls is CdcsyncError or "retry" not in vars(cls)
    else:
        assert cls.retry.value == retry


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_only_what_is_wrong_before_anything_was_done_exits_with_2(cls: type[CdcsyncError]) -> None:
    assert cls.exit_code == (EXIT_WRONG if issubclass(cls, ConfigError | SetupError) else EXIT_FAILED)


def test_an_error_reads_as_where_and_what_and_keeps_the_hint_apart() -> None:
    error = SetupError("wal_level is replica", where="source", hint="set wal_level = logical and restart")

    assert str(error) == "source: wal_level is replica"
    assert (error.message, error.where, error.hint) == (
        "wal_level is replica",
        "source",
        "set wal_level = logical and restart",
    )


def test_an_error_without_a_place_reads_as_what_alone() -> None:
    error = ConfigError("nothing to do")

    assert str(error) == "nothing to do"
    assert error.where is None
    assert error.hint is None


def test_a_malformed_message_names_its_tag_and_offset() -> None:
    error = MalformedMessage("I", 7, "tuple runs past the end")

    assert str(error) == "tuple runs past the end (tag 'I', byte 7)"
    assert (error.tag, error.offset, error.problem) == ("I", 7, "tuple runs past the end")


def test_an_unavailable_embedder_says_how_long_the_provider_wants_us_to_wait() -> None:
    error = EmbedderUnavailable("rate limit", where="embedders.x", hint="wait", retry_after_s=1.5)

    assert str(error) == "embedders.x: rate limit"
    assert error.hint == "wait"
    assert error.retry_after_s == 1.5
    assert EmbedderUnavailable("down").retry_after_s is None


WAITING, WRONG, SURPRISE = SourceUnavailable("down"), SetupError("no slot"), ValueError("a bug")


@pytest.mark.parametrize(
    ("together", "leads"),
    [
        ([WAITING], WAITING),
        ([WAITING, WRONG], WRONG),
        ([WRONG, WAITING], WRONG),
        ([WAITING, WRONG, SURPRISE], SURPRISE),
        ([WAITING, ExceptionGroup("inner", [WRONG, WAITING])], WRONG),
        ([ExceptionGroup("inner", [WAITING]), ExceptionGroup("inner", [SURPRISE]), WRONG], SURPRISE),
    ],
)
def test_a_surprise_leads_a_group_and_then_what_needs_an_operator(together: list[Exception], leads: Exception) -> None:
    assert leading(ExceptionGroup("tasks", together)) is leads


def test_of_equals_the_first_leads_a_group() -> None:
    first, second = SetupError("one"), SetupError("two")

    assert leading(ExceptionGroup("tasks", [WAITING, first, second])) is first


def test_what_a_set_up_lacks_while_the_worker_runs_is_said_in_the_same_words_with_another_exit_status() -> None:
    lacking = SetupError("permission denied", where="target", hint="grant it", sqlstate="42501")
    error = RunError.of(lacking)
    assert (str(error), error.hint, error.sqlstate) == (str(lacking), lacking.hint, "42501")
    assert (lacking.exit_code, error.exit_code) == (EXIT_WRONG, EXIT_FAILED)
