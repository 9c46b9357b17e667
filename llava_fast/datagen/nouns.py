"""Noun phrases of captions, extracted by an installed tagger.

- "textblob": TextBlob's chunker, whose lexicon is part of the package; about 10,000 captions per second.
- "spacy:MODEL": spaCy's noun chunks, as for LLaVA's 595K subset; slower, and the model must be downloaded.
- "module:function": a user's function from a list of captions to a list of phrases for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

from tqdm import tqdm

from llava_fast.datagen.plugins import function
from llava_fast.errors import DataError, MissingPackageError

Tagger = Callable[[Sequence[str]], Iterable[Sequence[str]]]

TEXTBLOB = "textblob"
_PER_CALL = 2000
_ARTICLES = re.compile(
    r"^(?:a|an|the|this|that|these|those|its|his|her|their|my|your|our|some|any|each|every)\s+", re.IGNORECASE
)
_NOUN_TAGS = ("NN", "NNS", "NNP", "NNPS")


def tagger(name: str) -> Tagger:
    """Return the tagger of a name. Raises MissingPackageError or DataError."""
    if name == TEXTBLOB:
        return _textblob()
    if name.startswith("spacy:"):
        return _spacy(name.removeprefix("spacy:"))
    return function(name, "the tagger")


def noun_phrases(captions: Sequence[str], name: str, workers: int = 0) -> Iterator[list[str]]:
    """Return each caption's distinct phrases in lower case, with single spaces and without a leading article.

    workers  number of tagging processes; 0: the current process.
    """
    tagger(name)  # raises errors here and not in a worker
    parts = [captions[start : start + _PER_CALL] for start in range(0, len(captions), _PER_CALL)]
    with tqdm(total=len(captions), desc="noun phrases", unit="caption", unit_scale=True) as bar:
        if workers:
            with ProcessPoolExecutor(workers) as pool:
                done: Iterable[list[list[str]]] = pool.map(_tagged, parts, [name] * len(parts))
                yield from _flat(done, bar)
        else:
            yield from _flat((_tagged(part, name) for part in parts), bar)


def _flat(done: Iterable[list[list[str]]], bar: tqdm) -> Iterator[list[str]]:
    for part in done:
        yield from part
        bar.update(len(part))


def _tagged(captions: Sequence[str], name: str) -> list[list[str]]:
    found = [list(dict.fromkeys(filter(None, map(normal, phrases)))) for phrases in tagger(name)(captions)]
    if len(found) != len(captions):
        raise DataError(
            f"the tagger {name!r} gave phrases for {len(found)} of {len(captions)} captions: give a list each"
        )
    return found


def normal(phrase: str) -> str:
    return _ARTICLES.sub("", " ".join(phrase.lower().split())).strip(" .,;:!?\"'")


def _textblob() -> Tagger:
    try:
        from textblob.en import parse
    except ImportError:
        raise MissingPackageError("choosing pairs by noun phrases", "textblob", "data") from None

    def tag(captions: Sequence[str]) -> Iterator[list[str]]:
        for caption in captions:
            yield list(_chunks(parse(caption.replace("/", ", "), chunks=True)))

    return tag


def _chunks(parsed: str) -> Iterator[str]:
    """Return the noun phrases of tokens "word/TAG/CHUNK/...", in which B-NP begins a phrase and I-NP continues it. (The
    parser's string type has a different `split`.)"""
    phrase: list[tuple[str, str]] = []
    for token in [*str.split(parsed), "/END/O/"]:
        word, tag, chunk = [*token.split("/"), "", ""][:3]
        if chunk != "I-NP":
            if any(kind in _NOUN_TAGS for _, kind in phrase):
                yield " ".join(each for each, _ in phrase)
            phrase = []
        if chunk in ("B-NP", "I-NP"):
            phrase.append((word, tag))


def _spacy(model: str) -> Tagger:
    try:
        import spacy
    except ImportError:
        raise DataError(
            f"the tagger spacy:{model} needs spaCy: pip install spacy && python -m spacy download {model}"
        ) from None
    try:
        nlp = spacy.load(model, exclude=["ner", "lemmatizer"])
    except OSError:
        raise DataError(f"spaCy has no model {model}: python -m spacy download {model}") from None

    def tag(captions: Sequence[str]) -> Iterator[list[str]]:
        texts = iter(captions)
        while part := list(islice(texts, 256)):
            for document in nlp.pipe(part):
                yield [chunk.text for chunk in document.noun_chunks]

    return tag
