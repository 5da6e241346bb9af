"""How near does the pipeline come to an accelerator's own speed?

As `bench/embed.py`, with what an accelerator changes: it computes so fast that tokenising, counting and storing become
what vectors wait for. The models have random weights and the shapes of well-known ones, since a shape alone decides how
fast a model is; so nothing has to be downloaded. Their tokenizer is trained on the texts.

Without an accelerator the script says so and measures nothing, unless one is told to go on with `--device cpu`.
"""

from __future__ import annotations

import argparse
import importlib
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from cdcsync.demo.corpus import docstrings

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import pipeline
    from bench.embed import ROUNDS, encode, in_turns
    from bench.report import not_run, report
else:
    from _pipeline import pipeline
    from embed import ROUNDS, encode, in_turns
    from report import not_run, report

WORDS = (5, 120)
"""The fewest and the most words of a text."""
LONGEST = 16
"""Longer words have many tokens: without them, each text is one chunk."""
SAMPLE = 2_048
"""Texts by which the best batch size is found, and which the worker embeds before the clock starts."""
BATCH_SIZES = (32, 128, 512)
VOCABULARY = 8_000
READS = 256
"""Tokens that the models read."""
GOAL = 0.9


class Shape(NamedTuple):
    """The sizes of a BERT model."""

    layers: int
    hidden: int
    heads: int
    inner: int


SHAPES = {"minilm": Shape(6, 384, 12, 1536), "bert-base": Shape(12, 768, 12, 3072)}
"""Those of all-MiniLM-L6-v2 and of bge-base, e5-base, gte-base and others."""


def make_model(directory: Path, shape: Shape, corpus: list[str]) -> None:
    """Write a sentence-transformers model of a shape, with random weights and mean pooling."""
    modules = importlib.import_module("sentence_transformers.base.modules")
    pooling = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    transformers = importlib.import_module("transformers")
    tokenizers = importlib.import_module("tokenizers")
    words = tokenizers.BertWordPieceTokenizer()
    words.train_from_iterator(corpus, vocab_size=VOCABULARY, show_progress=False)
    ends = (("[SEP]", words.token_to_id("[SEP]")), ("[CLS]", words.token_to_id("[CLS]")))
    words._tokenizer.post_processor = tokenizers.processors.BertProcessing(*ends)
    base = directory / "base"
    special = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, model_max_length=READS, mask_token="[MASK]", **special
    ).save_pretrained(base)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=words.get_vocab_size(),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.inner,
            max_position_embeddings=READS,
        )
    ).save_pretrained(base)
    steps = [modules.Transformer(str(base)), pooling.Pooling(shape.hidden, "mean"), pooling.Normalize()]
    importlib.import_module("sentence_transformers").SentenceTransformer(modules=steps, device="cpu").save_pretrained(
        str(directory / "model"), create_model_card=False
    )


def written(corpus: list[str], count: int) -> list[str]:
    """Return so many different texts of the corpus' words, of every length."""
    words = [word for word in " ".join(corpus).split() if word.isalpha() and len(word) < LONGEST]
    dice = random.Random(17)

    def text(number: int) -> str:
        start, length = dice.randrange(len(words)), dice.randint(*WORDS)
        return f"{number} {' '.join(words[start : start + length])}"

    return [text(number) for number in range(count)]


def measure(shape: str, device: str, texts: list[str], round_texts: int, directory: Path) -> dict[str, float]:
    """Return texts a second of both sides, and the ratio, for one model."""
    make_model(directory, SHAPES[shape], texts)
    path = directory / "model"
    model = importlib.import_module("sentence_transformers").SentenceTransformer(str(path), device=device)
    encode(model, texts[:64], 32)  # what only the first call costs
    best = min(BATCH_SIZES, key=lambda size: min(encode(model, texts[:SAMPLE], size) for _ in range(2)))
    embedder = f'type = "sentence-transformers"\nmodel = "{path}"\ndevice = "{device}"\nbatch_size = {best}'
    print(f"{shape}:", flush=True)
    with pipeline(embedder, shared_buffers="512MB", max_wal_size="8GB") as made:
        alone, worker = in_turns(made, model, best, texts, round_texts)
    return {
        f"{shape}_encode_texts_per_s": round_texts / median(alone),
        f"{shape}_encode_best_batch_texts": best,
        f"{shape}_pipeline_texts_per_s": round_texts / median(worker),
        f"{shape}_pipeline_over_encode": median(one / other for one, other in zip(alone, worker, strict=True)),
    }


def main() -> None:
    """Measure and report."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--device", default="cuda", help="the torch device that both sides use")
    options.add_argument("--texts", type=int, default=20_000, help="texts of a round")
    options.add_argument("--shape", choices=SHAPES, action="append", help="all, by default")
    asked = options.parse_args()
    torch = importlib.import_module("torch")
    if asked.device == "cuda" and not torch.cuda.is_available():
        not_run("gpu", "torch sees no accelerator here (--device cpu measures a processor)")
        return
    corpus = [entry.doc for entry in docstrings()]
    texts = written(corpus, SAMPLE + ROUNDS * asked.texts)
    figures: dict[str, float] = {"round_texts": asked.texts}
    for shape in asked.shape or SHAPES:
        with tempfile.TemporaryDirectory(prefix="cdcsync-bench-") as directory:
            figures |= measure(shape, asked.device, texts, asked.texts, Path(directory))
    if asked.device == "cuda":
        print(f"on {torch.cuda.get_device_name()}")
    ratios = {name: figures.pop(name) for name in list(figures) if name.endswith("_over_encode")}
    report("gpu", figures, ratios, dict.fromkeys(ratios, GOAL), "the model alone, same run")


if __name__ == "__main__":
    main()
