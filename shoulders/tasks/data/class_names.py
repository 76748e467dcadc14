"""Names of classes that labelled images do not give: from a file that the user wrote, or from the images' own names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError
from shoulders.tasks.class_match import ClassMap

FORMS = (
    "give a JSON object {class of the data: name or number of the head's class}, a JSON list of names by number, or a "
    "text file with a class and its name on each line, as ImageNet's LOC_synset_mapping.txt"
)
WORDNET_ID = re.compile(r"(?<![A-Za-z0-9])(n\d{8})(?![0-9])[ _.-]*(.*)")
NUMBER = re.compile(r"[ _.-]*\(?\d+\)?$")


def read_class_map(path: Path) -> ClassMap:
    """{class of the data: name or number of the head's class} of a file.

    Raises:
        DataError: the file cannot be read, or has none of the known forms.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = _parse_lines(text) if path.suffix == ".txt" else json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); {FORMS}") from None
    if isinstance(given, list):
        given = {str(number): name for number, name in enumerate(given)}
    if not isinstance(given, dict) or not given or not all(type(target) in (str, int) for target in given.values()):
        raise DataError(f"{path}: not a list of names of classes; {FORMS}")
    return given


def _parse_lines(text: str) -> dict[str, str]:
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return {pair[0]: pair[-1] for pair in pairs}


def classes_in_names(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]] | None:
    """The classes of images in one folder by their file names, and the class of each image.

    ``n01440764_tench.JPEG`` is of the class "n01440764, tench", ``n01440764_10026.JPEG`` of "n01440764", and
    ``english_springer_2.jpg`` of "english_springer". A WordNet id counts where all names have one.

    Returns:
        None where an image is in another folder, or has nothing but a number for its name.
    """
    stems = [PurePosixPath(name).stem for name in names]
    found = [WORDNET_ID.search(stem) for stem in stems]
    if all(found):
        pairs = [(match[1], NUMBER.sub("", match[2])) for match in found if match]
    else:
        pairs = [("", NUMBER.sub("", stem)) for stem in stems]
    if any("/" in name for name in names) or not all(map(any, pairs)):
        return None
    words: dict[str, set[str]] = {}
    for wordnet_id, word in pairs:
        words.setdefault(wordnet_id or word, set()).add(word)
    keys = sorted(words)
    index_of = {key: index for index, key in enumerate(keys)}
    labels = np.array([index_of[wordnet_id or word] for wordnet_id, word in pairs], dtype=np.int64)
    return [_join(key, words[key]) for key in keys], labels


def _join(key: str, words: set[str]) -> str:
    """A WordNet id and the word beside it, where all of its images have the same."""
    return ", ".join(dict.fromkeys((key, *words))).removesuffix(", ") if len(words) == 1 else key
