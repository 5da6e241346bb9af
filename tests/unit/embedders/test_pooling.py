"""Pooling: each mode over texts of different lengths, padded at the end."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from cdcsync.embedders.pooling import Mode, pool, pooling_modes

TOKENS = np.array([[[1, 10], [3, 30], [5, 50]], [[2, -20], [9, 9], [9, 9]]], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0]], np.int64)


@pytest.mark.parametrize(
    ("mode", "vectors"),
    [
        ("cls", [[1, 10], [2, -20]]),
        ("lasttoken", [[5, 50], [2, -20]]),
        ("max", [[5, 50], [2, -20]]),
        ("mean", [[3, 30], [2, -20]]),
        ("mean_sqrt_len_tokens", [[9 / 3**0.5, 90 / 3**0.5], [2, -20]]),
        ("weightedmean", [[22 / 6, 220 / 6], [2, -20]]),
    ],
)
def test_padding_takes_no_part(mode: Mode, vectors: list[list[float]]) -> None:
    assert np.allclose(pool(TOKENS, MASK, [mode]), vectors)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_tokens_of_halves_make_vectors_of_whole_floats(mode: Mode) -> None:
    assert pool(TOKENS.astype(np.float16), MASK, [mode]).dtype == np.float32


def test_several_modes_are_joined_in_their_order() -> None:
    assert pool(TOKENS, MASK, ["cls", "max"]).tolist() == [[1, 10, 5, 50], [2, -20, 2, -20]]


def test_a_text_without_tokens_is_a_vector_of_zeros() -> None:
    assert pool(TOKENS[:1], np.zeros((1, 3), np.int64), ["mean"]).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({}, ("mean",)),
        ({"pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"pooling_mode_cls_token": False}, ("mean",)),
    ],
)
def test_older_and_newer_models_say_how_they_pool(settings: dict[str, object], modes: tuple[str, ...]) -> None:
    assert pooling_modes(settings) == modes


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown pooling mode sideways"):
        pooling_modes({"pooling_mode": "sideways"})
