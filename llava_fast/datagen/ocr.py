"""Text in images: words from an OCR engine, and samples of reading them, as in LLaVAR's 422K (arXiv 2306.17107).

LLaVAR selected images from LAION with a classifier and clustering, and did not publish how it merged boxes. Here the
images are given, and lines are sorted into reading order by their boxes.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_fast.datagen.filters import Duplicates, Unusable
from llava_fast.datagen.output import Report, turns
from llava_fast.datagen.plugins import function
from llava_fast.datagen.records import Record
from llava_fast.datagen.wording import Questions
from llava_fast.errors import DataError, MissingPackageError
from llava_fast.storage.journal import Journal, file_identity

RAPIDOCR = "rapidocr"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Word:
    """A recognised text: its box (left, top, right, bottom) in pixels, and the confidence from 0 to 1."""

    text: str
    box: tuple[float, float, float, float]
    score: float


Engine = Callable[[str], Iterable[Word]]


def engine(name: str) -> Engine:
    """Return the OCR engine "rapidocr", or "module:function", a function from a path to Words. Raises
    MissingPackageError or DataError."""
    return _rapidocr() if name == RAPIDOCR else function(name, "the OCR engine")


def _rapidocr() -> Engine:
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise MissingPackageError("reading text in pictures", "rapidocr and onnxruntime", "ocr") from None
    of_thread = threading.local()  # a reader keeps state while it reads

    def read(path: str) -> list[Word]:
        if not hasattr(of_thread, "reader"):
            of_thread.reader = RapidOCR(params={"Global.log_level": "error"})
        found: Any = of_thread.reader(path)
        if found.txts is None:
            return []
        return [
            Word(text, (box[:, 0].min(), box[:, 1].min(), box[:, 0].max(), box[:, 1].max()), score)
            for text, box, score in zip(found.txts, found.boxes, found.scores, strict=True)
        ]

    return read


def reading_order(words: Iterable[Word]) -> list[Word]:
    """Sort words into lines from top to bottom, each from left to right. A word belongs to a line if its centre is
    within the height of the line's first (topmost) word."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda each: (each.box[1] + each.box[3], each.box[0])):
        middle = (word.box[1] + word.box[3]) / 2
        for line in reversed(lines):
            if line[0].box[1] <= middle <= line[0].box[3]:
                line.append(word)
                break
        else:
            lines.append([word])
    return [word for line in lines for word in sorted(line, key=lambda each: each.box[0])]


def pictures(folder: Path) -> list[str]:
    """Return the sorted relative paths of the images below a folder. Raises DataError if there is none."""
    found = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES and path.is_file()
    )
    if not found:
        raise DataError(f"there is no picture ({', '.join(PICTURES)}) below {folder}")
    return found


def read_words(
    images: Sequence[str], folder: Path, name: str, journal: Journal, least_score: float = 0.5, workers: int = 1
) -> Iterator[Record]:
    """Yield a record for each image with its words in reading order. Earlier results are taken from the journal.

    An image that cannot be read has no words. Raises MissingPackageError or DataError.
    """
    keys = {image: _key(folder / image, name) for image in images}
    read = engine(name) if any(key not in journal for key in keys.values()) else None

    def words_of(image: str) -> list[Word] | str:
        """The words of a picture, or what is wrong with it."""
        if (kept := journal.entry(keys[image])) is not None:
            return [Word(text, tuple(box), score) for text, box, score in kept["words"]]
        assert read is not None
        try:
            return list(read(str(folder / image)))
        except Exception as error:  # an engine raises whatever it likes about a broken picture
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(images), desc="reading text", unit="picture") as bar:
        for image, found in zip(images, pool.map(words_of, images), strict=True):
            bar.update()
            if isinstance(found, str):
                tqdm.write(f"{image}: {found}")
                yield Record(id=image, image=image)
                continue
            if (key := keys[image]) not in journal:
                words = [[each.text, [float(value) for value in each.box], float(each.score)] for each in found]
                journal.append({"key": key, "image": image, "words": words})
            ordered = reading_order(each for each in found if each.score >= least_score and each.text.strip())
            yield Record(id=image, image=image, words=[" ".join(each.text.split()) for each in ordered])


def _key(path: Path, name: str) -> str:
    return hashlib.blake2b(json.dumps([name, *file_identity(path)]).encode(), digest_size=16).hexdigest()


def samples(
    records: Iterable[Record], questions: Questions, report: Report, least_words: int = 3, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield questions about the text of an image. Images with too few words or with duplicate words are omitted."""
    duplicates = Duplicates()
    for record in records:
        answer = "\n".join(record.words)
        try:
            if not answer:
                raise Unusable("no text")
            if len(answer.split()) < least_words:
                raise Unusable(f"fewer than {least_words} words")
            duplicates.check(answer)
        except Unusable as why:
            report.left_out[str(why)] += 1
            continue
        question = random.Random(f"{seed} {record.id}").choice(questions.questions)
        report.made["read text"] += 1
        yield {"id": record.id, **record.media(), "conversations": turns([(f"<image>\n{question}", answer)])}
