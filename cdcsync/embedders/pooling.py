"""Makes one vector of the vectors of a text's tokens, as the module Pooling of sentence-transformers does.

Source: sentence-transformers, module reference, "Pooling".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, assert_never, cast, get_args

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

_LEGACY: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",  # a token of text # nosec B105
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The keys of older models, one for each mode. Vectors of several modes are joined in this order."""

_LEAST = np.float32(1e-9)
"""A text without tokens is divided by this instead of by zero."""


def pooling_modes(settings: Mapping[str, Any]) -> tuple[Mode, ...]:
    """Return how the module pools, by its config.json.

    :raises ValueError: a mode is unknown.
    """
    if (named := settings.get("pooling_mode")) is None:
        return tuple(mode for key, mode in _LEGACY.items() if settings.get(key)) or ("mean",)
    modes = (named,) if isinstance(named, str) else tuple(named)
    if unknown := [str(mode) for mode in modes if mode not in get_args(Mode)]:
        raise ValueError(f"unknown pooling mode {', '.join(unknown)}")
    return modes


def pool(tokens: Vectors, mask: npt.NDArray[np.int64], modes: Sequence[Mode]) -> Vectors:
    """Return the texts' vectors, `float32[texts, modes x width]`.

    :param tokens: `float32[texts, tokens, width]`, padded at the end; a model of halves makes `float16`, in which the
        length of a vector overflows.
    :param mask: `int64[texts, tokens]`, 1 for a token and 0 for padding.
    """
    tokens = tokens.astype(np.float32, copy=False)
    return np.concatenate([_pooled(tokens, mask, mode) for mode in modes], axis=1)


def _pooled(tokens: Vectors, mask: npt.NDArray[np.int64], mode: Mode) -> Vectors:
    weights: Vectors = mask.astype(np.float32)
    made: Vectors
    match mode:
        case "cls":
            made = tokens[:, 0]
        case "lasttoken":
            made = tokens[np.arange(len(tokens)), np.maximum(mask.sum(axis=1) - 1, 0)]
        case "max":
            made = np.max(tokens, axis=1, where=mask[:, :, None] == 1, initial=np.float32(-np.inf))
        case "mean":
            made = _sum(tokens, weights) / _at_least(weights)
        case "mean_sqrt_len_tokens":
            made = (_sum(tokens, weights) / np.sqrt(_at_least(weights))).astype(np.float32)
        case "weightedmean":
            weights *= np.arange(1, tokens.shape[1] + 1, dtype=np.float32)
            made = _sum(tokens, weights) / _at_least(weights)
        case unknown:
            assert_never(unknown)
    return made


def _sum(tokens: Vectors, weights: Vectors) -> Vectors:
    """Return the weighted sum of each text's token vectors."""
    return cast("Vectors", (weights[:, None, :] @ tokens)[:, 0])


def _at_least(weights: Vectors) -> Vectors:
    """Return the sum of each text's weights, which is never zero."""
    return cast("Vectors", np.maximum(weights.sum(axis=1, keepdims=True), _LEAST))
