"""How long a text is for a model, and when that can be told without tokenising.

Tokenising costs more than all else that is done to a document before it is embedded, and most documents fit into one
chunk. So for the commonest tokenizers a text is first shown to fit by a cheaper count that is never too low.

Source: the `tokenizer.json` format of Hugging Face's tokenizers; BERT's basic and WordPiece tokenization.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from semantic_text_splitter import MarkdownSplitter, TextSplitter

from cdcsync.errors import ConfigError

CHARACTERS_PER_TOKEN = 4
"""Characters taken as one token where none are counted: about what English text has under common tokenizers."""

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""The trimmed characters: Unicode's White_Space, as in the splitter. `str.strip()` takes more: U+001C to U+001F."""

WORDS_REMEMBERED = 32_768
"""Words whose number of tokens is kept: nearly all words of running text, in a few megabytes."""

LONGEST_TOKEN = 16
"""Texts of more characters than this per token are not even tried without tokenising: hardly any of them fits."""

_PART = re.compile(r"[!-/:-@\[-`{-~]|[^ \t\n\r!-/:-@\[-`{-~]+")
"""ASCII punctuation, each character a part of its own, and what lies between it and ASCII blanks."""

Kind = TypeVar("Kind", TextSplitter, MarkdownSplitter)
Proof = Callable[[str, int], bool]
"""Says of a text and a number of tokens that it has no more; `False` where that cannot be told."""


class Sizes:
    """Measures texts: in tokens of a tokenizer, or in characters where there is none.

    :param tokenizer_json: the model's `tokenizer.json`.
    :param where: the config section, for errors.
    :ivar fingerprint: says what is counted.
    :ivar unseen: how many tokens the splitter may leave out of its counts: it does not see a blank that the tokenizer
        itself puts in front.
    :raises ConfigError: the tokenizer cannot be read.
    """

    def __init__(self, tokenizer_json: str | None, where: str) -> None:
        self._where = where
        self._tokenizer_json: str | None = None
        self._proof: Proof = lambda text, tokens: len(text) <= tokens * CHARACTERS_PER_TOKEN
        self.unseen = 0
        self.fingerprint = f"{CHARACTERS_PER_TOKEN} characters a token"
        if tokenizer_json is not None:
            try:
                tokenizer = json.loads(tokenizer_json)
                # Many tokenizers come with these enabled: all texts then seem to have the same number of tokens.
                tokenizer |= {"truncation": None, "padding": None}
            except (ValueError, TypeError) as error:
                raise self._unreadable(error) from error
            self._tokenizer_json = json.dumps(tokenizer, sort_keys=True)
            self._proof, self.unseen = _proof(tokenizer)
            self.fingerprint = f"tokenizer {hashlib.sha256(self._tokenizer_json.encode()).hexdigest()[:16]}"

    def splitter(self, kind: type[Kind], capacity: int, overlap: int) -> Kind:
        """Return a splitter of this kind that measures in these sizes; `capacity` and `overlap` are in tokens.

        :raises ConfigError: the tokenizer cannot be read.
        """
        if self._tokenizer_json is None:
            return kind(capacity * CHARACTERS_PER_TOKEN, overlap * CHARACTERS_PER_TOKEN)
        try:
            return kind.from_huggingface_tokenizer_str(self._tokenizer_json, capacity - self.unseen, overlap)
        except Exception as error:  # the binding raises bare Exception for what it cannot parse
            raise self._unreadable(error) from error

    def surely_fits(self, text: str, capacity: int) -> bool:
        """Say whether a text is within the capacity for certain. Most that are get a yes."""
        return self._proof(text, capacity)

    def _unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"the model's tokenizer.json cannot be read: {error}",
            where=self._where,
            hint="use a model that comes with a complete tokenizer.json, or save its tokenizer again",
        )


def _proof(tokenizer: dict[str, Any]) -> tuple[Proof, int]:
    """Return the proof for a tokenizer, and what the splitter does not see of its tokens.

    Two families are known, the commonest of today's models; with others every text is tokenised:

    - WordPiece as BERT has it, see `WordPieces`.
    - Byte-level BPE: a token is at least one byte. ASCII is left as it is by all Unicode normal forms. One blank may
      be put in front.
    """
    model = tokenizer.get("model") or {}
    normalizer = tokenizer.get("normalizer") or {}
    splits = tokenizer.get("pre_tokenizer") or {}
    kinds = (model.get("type"), normalizer.get("type"), splits.get("type"))
    added = [token["content"] for token in tokenizer.get("added_tokens") or []]
    # Added tokens are found inside words too, unless they begin and end with punctuation, as BERT's own do.
    inside = any(token[0].isalnum() or token[-1].isalnum() for token in added)
    if kinds == ("WordPiece", "BertNormalizer", "BertPreTokenizer") and not inside:
        return WordPieces(model, lowercase=normalizer["lowercase"]).at_most, 0
    *_, last = splits.get("pretokenizers") or [splits]
    if kinds[0] == "BPE" and kinds[1] in {None, "NFC", "NFD", "NFKC", "NFKD"} and last.get("type") == "ByteLevel":
        if not last.get("add_prefix_space"):
            return lambda text, tokens: len(text) <= tokens and text.isascii(), 0
        if last is splits:
            return lambda text, tokens: len(text) < tokens and text.isascii(), 1
    return lambda text, tokens: False, 1


class WordPieces:
    """Counts BERT's tokens from above, some thirty times as fast as tokenising and measuring.

    Blanks and ASCII punctuation part words whatever stands around them, so each part can be counted alone. Plain
    words are counted exactly, by BERT's rule: again and again the longest piece that the vocabulary has. Any other
    part has at most a token for each character of its canonical decomposition: a token is at least one character of
    the normalised text, and normalising strips, folds or decomposes characters, and puts in nothing but blanks.
    """

    def __init__(self, model: dict[str, Any], *, lowercase: bool) -> None:
        self._vocabulary = frozenset(model["vocab"])
        self._prefix: str = model["continuing_subword_prefix"]
        self._lowercase = lowercase
        self._longest: int = model["max_input_chars_per_word"]
        self._count = lru_cache(maxsize=WORDS_REMEMBERED)(self._pieces)

    def at_most(self, text: str, tokens: int) -> bool:
        """Say whether a text has no more than so many tokens; `False` where that cannot be told."""
        if len(text) <= tokens and _letters(text) <= tokens:
            return True
        if len(text) > tokens * LONGEST_TOKEN:
            return False
        count, longest = self._count, self._longest
        parts = _PART.findall(text.lower() if self._lowercase else text)
        return sum([count(part) if len(part) <= longest else _letters(part) for part in parts]) <= tokens

    def _pieces(self, part: str) -> int:
        """Return the tokens of a plain word, or an upper bound for any other part."""
        if not (part.isascii() and part.isalnum()):
            return _letters(part)
        start = pieces = 0
        while start < len(part):
            prefix = self._prefix if start else ""
            ends = range(len(part), start, -1)
            end = next((end for end in ends if prefix + part[start:end] in self._vocabulary), None)
            if end is None:
                return 1
            start, pieces = end, pieces + 1
        return pieces


def _letters(text: str) -> int:
    """Return the number of characters in a text's canonical decomposition."""
    return len(text) if text.isascii() else len(unicodedata.normalize("NFD", text))
