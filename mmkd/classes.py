"""Which class of a teacher is which of the student's, where they are not the same ones."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from mmkd.errors import ConfigError, nearest
from mmkd.values import is_whole


class ClassMap(NamedTuple):
    """The classes that student and teacher share, by index: ``student[i]`` is the teacher's ``teacher[i]``."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def check(self, student: int, teacher: int) -> None:
        """Raise ConfigError unless heads of so many classes have all of them."""
        for whose, indices, number in (('student', self.student, student), ('teacher', self.teacher, teacher)):
            if max(indices) >= number:
                raise ConfigError(f'classes: {whose} class {max(indices)}; it has {number}, 0 to {number - 1}')

    def of_student(self, logits: torch.Tensor, background: bool = False) -> torch.Tensor:
        """The shared classes of the student's logits, (P, K, ...); with ``background`` its last one as well."""
        return _pick(logits, self.student, background)

    def of_teacher(self, logits: torch.Tensor, background: bool = False) -> torch.Tensor:
        """The shared classes of the teacher's logits, in the same order."""
        return _pick(logits, self.teacher, background)


def _pick(logits: torch.Tensor, indices: Sequence[int], background: bool) -> torch.Tensor:
    # a list as an index would wait for the device
    parts = [logits.narrow(1, index, 1) for index in (*indices, *([logits.shape[1] - 1] if background else []))]
    return torch.cat(parts, 1)


def class_map(
    classes: Mapping, student: Sequence[str] | None, teacher: Sequence[str] | None, option: str = 'classes'
) -> ClassMap:
    """Read a map of the student's classes to the teacher's.

    Args:
        classes: Class of the student to class of the teacher, each by name or by index.
        student: The names of the student's classes, in the order of its head; None where they are not known.
        teacher: The same of the teacher.
        option: What the map is called in the config.

    Raises:
        ConfigError: for a class that is not there, with the nearest names, and where two classes learn from one.
    """
    if not isinstance(classes, Mapping) or not classes:
        raise ConfigError(
            f"{option}={classes!r}: expected the student's classes and those of the teacher that they are, such as "
            f"dict(car='vehicle')"
        )
    pairs: dict[int, int] = {}
    learners: dict[int, object] = {}
    for own, other in classes.items():
        index, of = index_of(own, student, option, 'student'), index_of(other, teacher, option, 'teacher')
        if index in pairs:
            raise ConfigError(f'{option}: class {own!r} of the student is named twice')
        if of in learners:
            raise ConfigError(
                f'{option}: {learners[of]!r} and {own!r} of the student both are {other!r} of the teacher, which does not '
                f'tell them apart; name one of them'
            )
        pairs[index], learners[of] = of, own
    order = sorted(pairs)
    return ClassMap(tuple(order), tuple(pairs[each] for each in order))


def index_of(name: object, names: Sequence[str] | None, option: str, whose: str) -> int:
    """A class's index, by its name or its index.

    Raises:
        ConfigError: for what is neither, and for a name that is not there.
    """
    if is_whole(name) and name >= 0:
        return name
    if not isinstance(name, str):
        raise ConfigError(f"{option}: {name!r}: expected a class's name or its index")
    if names is None:
        where = 'class_names of the model' if whose == 'student' else "the teacher's config names none"
        raise ConfigError(
            f'{option}: {name!r}: the names of the {whose} are not known ({where}); name classes by index'
        )
    if name not in names:
        raise ConfigError(f'{option}: the {whose} has no class {name!r}; the nearest are {nearest(name, names)}')
    return list(names).index(name)
