"""What is held out, what the classes are, which images a run belongs to: each decided here alone.

- Held out is what the user names, else the source's own split, else images chosen by a hash of
  their names: the same in every stage, also when images are added.
- A file that is held out under any name is not trained on.
- Every image has a label, or none has.
- A run belongs to its images' names, labels and splits, and to marks of some of their contents.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from vqvae2.common.config import shown
from vqvae2.common.errors import UserError
from vqvae2.common.runs import SAMPLE_NAME
from vqvae2.common.vocabulary import MIN_HELD_OUT

logger = logging.getLogger(__name__)

SPLIT_WORDS = {  # as `datasets` reads the names of folders and files
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NUM_MARKS = 128
MAX_NAME = 4096  # characters: what is longer is no name


def split_of(word: str) -> str | None:
    """The split that a folder's or file's name stands for: train, validation or test."""
    return next((split for split, words in SPLIT_WORDS.items() if word.lower() in words), None)


def loose_split_of(name: str) -> str | None:
    """The split that a word of a folder's name stands for, as in seg_train or test-set."""
    return next(filter(None, map(split_of, re.split(r"[-_. ]", name))), None)


def pick_splits(
    names: Collection[str], source: str, word_of: Callable[[str], str | None] = split_of
) -> tuple[str, str | None]:
    """The names of the training and of the held-out split: validation is preferred to test."""
    by_split = {word_of(name) or name: name for name in reversed(list(names))}
    train = by_split.get("train", next(iter(names)))
    held_out = by_split.get("validation", by_split.get("test"))
    held_out = None if held_out == train else held_out
    unused = sorted(set(names) - {train, held_out})
    if unused:
        chosen = "nothing" if held_out is None else repr(held_out)
        logger.info("%s: %s is held out; not used: %s.", source, chosen, ", ".join(unused))
    return train, held_out


def split_files(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by split: their folder, or the first word of their name, may say which; else train."""
    by_split: dict[str, list[Path]] = {}
    for path in files:
        word = re.split("[-_.]", path.name)[0]
        split = split_of(path.parent.name) or split_of(word) or "train"
        by_split.setdefault(split, []).append(path)
    return by_split


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the image of this name is held out: a hash decides, whatever the other images are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64


def enough_held_out(number: int) -> float:
    """The share of so many images to hold out; 0 if it would be more than a quarter of them."""
    share = max(0.05, 1.5 * MIN_HELD_OUT / number)  # names decide, so it may become fewer
    return round(share, 3) if share <= 0.25 else 0.0


def warn_of_few_held_out(held_out: int, number: int, *, share: float | None) -> None:
    """Warn that fewer than `MIN_HELD_OUT` images choose no weights. `share` is the fraction that
    names hold out; None where the source holds them out itself."""
    if held_out >= MIN_HELD_OUT or share == 0:
        return
    advice = "more images would be held out with --data.validation-path"
    if share is not None and (enough := enough_held_out(number)):
        advice = f"--image.validation-fraction {enough:g} holds out more"
    few = "%d images are held out, too few to choose the best weights by: the last ones are kept"
    logger.warning(f"{few} ({advice}).", held_out)


def not_held_out(train: Iterable[Path], held_out: Iterable[Path]) -> list[bool]:
    """Whether each training file is not held out too, whatever names it (a link, a spelling)."""
    known = {_file(path) for path in held_out}
    return [_file(path) not in known for path in train]


def drop_held_out(
    rows: Sequence[int], train: Sequence[Path], held_out: Iterable[Path], source: str
) -> list[int]:
    """The rows of training pictures whose files are not held out under any name."""
    apart = not_held_out([train[i] for i in rows], held_out)
    kept = [i for i, is_apart in zip(rows, apart, strict=True) if is_apart]
    if not all(apart):
        text = "%s: %d images are held out under another name, and not trained on."
        logger.info(text, source, len(rows) - len(kept))
    return kept


def _file(path: Path) -> object:
    """The same for all names of a file."""
    try:
        status = os.stat(path)
    except OSError:
        return str(path)
    return status.st_dev, status.st_ino


def number_classes(
    values: Sequence[Any], source: str, names: Sequence[str] | None = None
) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers from 0 on, and the classes' names.

    Args:
        values: class names, numbers or truth values; all of one kind.
        names: what the numbers mean; without it the sorted values are the classes, as numbers
            where all of them are whole.

    Raises:
        UserError: a value is missing, of another kind, or not the number of a class.
    """
    # The first value that is no class. (-1 is the Hub's mark of a row without one.)
    kind = type(values[0]) if values and type(values[0]) in (bool, int, str) else str
    found: set[Any] = {value for value in values if type(value) is kind and value != ""}
    numbers = whole_numbers(map(str, found)) if kind is not bool else None
    bad = [value for value in values if type(value) is not kind or value == ""]
    if names is not None and kind is int:
        bad += [value for value in found if not 0 <= value < len(names)]
    elif names is not None:
        bad += values
    elif numbers is not None and -1 in numbers and set(numbers) != {-1, 1}:
        bad.append(-1)
    if bad:
        what = f"{source} does not give every row a class (found {shown(bad[0])})"
        what_to_do = "fill it in, or leave labels alone with --data.label-column none"
        raise UserError(f"{what}: {what_to_do}.")

    # Numbers for them.
    if names is not None:
        return list(values), tuple(names)
    key = str if kind is str and numbers is None else lambda value: (int(value), str(value))
    classes = sorted(found, key=key)
    check_names(map(str, classes), source)
    number_of = {value: number for number, value in enumerate(classes)}
    return [number_of[value] for value in values], tuple(map(str, classes))


def whole_numbers(names: Iterable[str]) -> list[int] | None:
    """The names of classes as numbers, if all of them are whole numbers."""
    names = list(names)
    return list(map(int, names)) if all(re.fullmatch("-?[0-9]{1,18}", n) for n in names) else None


def find_class(name: str, numbers: Mapping[str, int]) -> int | None:
    """The number of a class by its name; accents may be composed in another way."""
    if name in numbers:
        return numbers[name]
    composed = {normalize("NFC", other): number for other, number in numbers.items()}
    return composed.get(normalize("NFC", name))


def few(names: Collection[object]) -> str:
    """The first names and the number of all, for a sentence."""
    first = ", ".join(shown(name).strip("'\"") for name in islice(names, 5))
    return first if len(names) <= 5 else f"{first}, ... ({len(names):,})"


def check_labelled(has_label: bool, labelled: bool, image: str) -> None:
    """Every image has a label, or none has. Raises UserError: this one differs from the first."""
    if has_label != labelled:
        this, first = ("a label", "none") if has_label else ("no label", "one")
        what = f"{image} has {this}, but the first has {first}"
        raise UserError(f"{what}: label all images, or none.")


def check_no_class_lost(lost: Collection[int], names: Sequence[str], source: str) -> None:
    """Raises UserError: these classes, in `source`, have lost all of their images."""
    if lost:
        what = f"{source}: no image of the class {names[min(lost)]!r} can be read"
        raise UserError(f"{what}: check the disk and the files' permissions, or remove the class.")


def check_names(names: Iterable[str], source: str) -> None:
    """Every image needs a name of its own, in characters that can be written down.

    Raises UserError: naming one that occurs twice, or is no text that can be a name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            what = f"{source} names {shown(name)} more than once"
            raise UserError(f"{what}: give each its own name.")
        if not name.isascii() and re.search("[\ud800-\udfff]", name):
            raise UserError(f"{source} holds {shown(name)}, which is not UTF-8: rename it.")
        if len(name) > MAX_NAME or "\0" in name:
            what = f"{source} holds {shown(name)}, which is no name"
            raise UserError(f"{what}: give one of at most {MAX_NAME:,} characters, without NUL.")
        seen.add(name)


def image_facts(lines: Iterable[str], marks: Iterable[object]) -> dict[str, str]:
    """What a run that continues must find again: its images' names, and marks of some contents.

    A mark is cheap and tells an image from another of the same name: a file's length, a checksum.
    """
    digest = hashlib.sha256()
    for line in lines:  # joined, the names of millions would take as much memory again
        digest.update(line.encode())
    return {"image_names_hash": digest.hexdigest(), SAMPLE_NAME: " ".join(map(str, marks))}


def marked(number: int) -> range:
    """Which of this many images are marked: some from all over the source."""
    return range(0, number, max(1, number // NUM_MARKS))
