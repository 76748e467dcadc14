"""Which class of a teacher's head is which class of labelled data: scores are of the classes that both have."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoulders.errors import RecipeError

ClassMap = Mapping[str, str | int]  # a class of the data -> the name or the number of the head's class
BACKGROUND = "background"
MAX_NAMES = 3  # in a message
COUNT = re.compile(r"\s*\(\d+\)$")  # where a config must not hold a name twice, as in "crane (2)"
Names = list[str]  # of one class, normalized


@dataclass(frozen=True)
class ClassMatch:
    """The classes that a head and data have in common.

    Args:
        head_classes: the names of the head's classes, by index.
        data_classes: the names of the data's K classes, by index.
        indices: for each class of the head its index in the data, -1 where the data lacks it.
    """

    head_classes: tuple[str, ...]
    data_classes: tuple[str, ...]
    indices: tuple[int, ...]

    @property
    def common(self) -> list[int]:
        """The classes of both, as indices in the data."""
        return sorted(index for index in self.indices if index >= 0)

    @property
    def background(self) -> int | None:
        """The index in the data of a class of both that is called background; None where there is none."""
        return next((index for index in self.common if normalize(self.data_classes[index]) == BACKGROUND), None)

    def head_only(self) -> list[str]:
        """The names of the head's classes that the data lacks."""
        return [name for name, index in zip(self.head_classes, self.indices, strict=True) if index < 0]

    def data_only(self) -> list[str]:
        """The names of the data's classes that no class of the head is, or more than one may be."""
        taken = set(self.indices)
        return [name for index, name in enumerate(self.data_classes) if index not in taken]

    def settings(self, labels_left_out: int, unit: str) -> dict[str, float | int | str]:
        """The settings of a score on some of the classes; none where both have the same.

        Args:
            labels_left_out: how many labels are of a class that the head lacks.
            unit: what they are labels of, such as ``images``.
        """
        of_head, of_data = self.head_only(), self.data_only()
        if not of_head and not of_data:
            return {}
        parts = [f"{len(of_head)} of the head ({first_names(of_head)})"] if of_head else []
        if of_data:
            parts.append(f"{len(of_data)} of the data ({first_names(of_data)}; {unit}: {labels_left_out})")
        return {
            "classes": len(self.common),
            "head_classes_left_out": len(of_head),
            "data_classes_left_out": len(of_data),
            "labels_left_out": labels_left_out,
            "classes_left_out": " and ".join(parts),
        }


def match_classes(head_classes: Sequence[str], data_classes: Sequence[str], class_map: ClassMap) -> ClassMatch:
    """The classes of a head that are classes of the data.

    A class of the data is the head's class whose number or name ``class_map`` gives; else the one of its own name.
    Case, spaces, underscores and hyphens do not count, and a synonym will do (ImageNet has "tench, Tinca tinca"). The
    k-th of several classes of one name (ImageNet has two cranes) is the k-th of that name; where the head has another
    number of them, they are left out. Classes with numbers alone are the head's where both have equally many.

    Raises:
        RecipeError: no class in common, numbers of which nobody knows the names, or a map that does not fit.
    """
    targets = _targets(data_classes, class_map)
    indices = _by_number(len(head_classes), data_classes, targets)
    heads = list(map(synonyms, head_classes))
    data = [synonyms(str(target)) for target in targets]
    names_to_compare: tuple[tuple[Callable[[Names], Names], Callable[[Names], Names]], ...] = (
        (_full, _full),
        (_each, _first),
        (_each, _each),
    )
    for of_data, of_head in names_to_compare:
        _pair(indices, list(map(of_head, heads)), list(map(of_data, data)))
    if max(indices, default=-1) < 0:
        indices = _numbered(head_classes, data_classes, class_map)
    return ClassMatch(tuple(head_classes), tuple(data_classes), tuple(indices))


def synonyms(name: str) -> Names:
    """The normalized names of a class: a comma separates several, and a count such as ``(2)`` is no part of them."""
    uncounted = COUNT.sub("", name)
    return list(dict.fromkeys(normalize(part) for part in uncounted.split(",") if part.strip())) or [name]


def normalize(name: str) -> str:
    """The letters and digits of a name in lower case; the name itself where it has none."""
    return "".join(filter(str.isalnum, name.casefold())) or name


def first_names(names: Sequence[str]) -> str:
    """Up to three names, with dots where there are more."""
    return ", ".join(map(repr, names[:MAX_NAMES])) + (", .." if len(names) > MAX_NAMES else "")


def _full(names: Names) -> Names:
    return [",".join(names)]


def _first(names: Names) -> Names:
    return names[:1]


def _each(names: Names) -> Names:
    return names


def _pair(indices: list[int], heads: Sequence[Names], data: Sequence[Names]) -> None:
    """Pair the classes that have no partner yet and share a name, in order, where both sides have equally many."""
    taken = set(indices)
    of_head = _by_name(heads, [index < 0 for index in indices])
    of_data = _by_name(data, [index not in taken for index in range(len(data))])
    for name, members in of_data.items():
        candidates = [head for head in of_head.get(name, ()) if indices[head] < 0]
        free = [index for index in members if index not in taken]
        if len(free) == len(candidates):
            for head, index in zip(candidates, free, strict=True):
                indices[head] = index
            taken.update(free)


def _by_name(classes: Sequence[Names], is_free: Sequence[bool]) -> dict[str, list[int]]:
    by_name: dict[str, list[int]] = {}
    for index, names in enumerate(classes):
        for name in names if is_free[index] else ():
            by_name.setdefault(name, []).append(index)
    return by_name


def _targets(data_classes: Sequence[str], class_map: ClassMap) -> list[str | int]:
    """For each class of the data the name or the number that a map gives, else its own name."""
    by_name = {normalize(name): target for name, target in class_map.items()}
    targets: list[str | int] = []
    for name in data_classes:
        mapped = [by_name[key] for key in (normalize(name), *synonyms(name)) if key in by_name]
        targets.append(mapped[0] if mapped else name)
    if class_map and targets == list(data_classes) and not {*map(normalize, data_classes)} & {*by_name}:
        raise RecipeError(
            f"--classes: none of its names ({first_names(list(class_map))}) is a class of the data "
            f"({first_names(data_classes)})"
        )
    return targets


def _by_number(count: int, data_classes: Sequence[str], targets: Sequence[str | int]) -> list[int]:
    """For each class of the head the class of the data that is mapped to its number, or -1."""
    indices = [-1] * count
    for index, target in enumerate(targets):
        if isinstance(target, str):
            continue
        if not 0 <= target < count:
            raise RecipeError(
                f"--classes: {data_classes[index]!r} is class {target} of the head, which has 0 to {count - 1}"
            )
        if indices[target] >= 0:
            both = f"{data_classes[indices[target]]!r} and {data_classes[index]!r}"
            raise RecipeError(f"--classes: {both} are both class {target} of the head; give it to one of them")
        indices[target] = index
    return indices


def _numbered(head_classes: Sequence[str], data_classes: Sequence[str], class_map: ClassMap) -> list[int]:
    """The data's numbers taken as those of the head's classes, where both have equally many."""
    if class_map or not all(name.isdecimal() for name in data_classes):
        raise RecipeError(
            f"the head ({len(head_classes)} classes: {first_names(head_classes)}) and the data ({len(data_classes)}: "
            f"{first_names(data_classes)}) have no class in common; give --classes with the head's class for each "
            "(for WordNet ids: the LOC_synset_mapping.txt that comes with ImageNet)"
        )
    numbers = {int(name): index for index, name in enumerate(data_classes)}
    if sorted(numbers) != list(range(len(head_classes))):
        raise RecipeError(
            f"the data has {len(data_classes)} classes with numbers alone ({first_names(data_classes)}), the head "
            f"{len(head_classes)} ({first_names(head_classes)}): which is which? give --classes with the name of each"
        )
    return [numbers[number] for number in range(len(head_classes))]
