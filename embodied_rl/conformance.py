"""Whether two that meet (demonstrations, a checkpoint, an env) mean the same by actions and by what is seen.

What differs is refused in one sentence, what nobody has said is no difference, and both are told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import ValidationError

from embodied_rl.convention import ITEMS, UNKNOWN, Agreement, Convention, Item, compare
from embodied_rl.errors import CapabilityError, ConfigError
from embodied_rl.spec import EnvSpec, TensorSpec

log = logging.getLogger(__name__)
Entry = TypeVar("Entry")


@runtime_checkable
class Negotiated(Protocol):
    """What an env offers beside `Env` when it is made of parts that had to agree."""

    conformance: tuple[str, ...]
    """What is the same in all, unknown, filled, mapped or converted, one sentence each."""


@dataclass(frozen=True)
class Side:
    """What one of the two says.

    Example: `Side("checkpoint runs/a", Convention(gripper="opens_at_plus"), {"wrist": (64, 64)}, 20.0)`.
    """

    where: str
    """Its name in messages."""
    convention: Convention | None
    """Of its actions, `UNKNOWN` where it does not say; None where no numbers move a robot (ids, tokens)."""
    pictures: dict[str, tuple[int, int]] | None = None
    """Camera -> rows and columns; None where it does not say."""
    control_hz: float | None = None
    vocabularies: dict[str, str] | None = None
    """Entry of ids -> its vocabulary, where there is one with a name; None where it does not say."""
    vectors: dict[str, tuple[int, str]] | None = None
    """Entry -> how many numbers it has and what they mean ("" where nobody says); None where it does not say."""
    numbers: int | None = None
    """Of an action; None where it does not say, or where no numbers move a robot."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest number of an action: of an env what it takes, of demonstrations what they hold."""

    @classmethod
    def of(cls, where: str, spec: EnvSpec) -> Side:
        """What an env says."""
        pictures = {
            name: (entry.shape[0], entry.shape[1])
            for name, entry in spec.seen.items()
            if entry.dtype == torch.uint8 and len(entry.shape) == 3
        }
        said = (pictures, spec.control_hz, vocabularies_of(spec.seen), vectors_of(spec.seen))
        if spec.action.kind != "continuous":
            return cls(where, None, *said)
        return cls(where, spec.action.convention or UNKNOWN, *said, spec.action.size, (-1.0, 1.0))

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "convention": None if self.convention is None else self.convention.model_dump(mode="json"),
            "pictures": None if self.pictures is None else {name: list(size) for name, size in self.pictures.items()},
            "control_hz": self.control_hz,
            "vocabularies": self.vocabularies,
            "vectors": None if self.vectors is None else {name: list(said) for name, said in self.vectors.items()},
            "numbers": self.numbers,
            "bounds": None if self.bounds is None else list(self.bounds),
        }

    @classmethod
    def restore(cls, where: str, state: dict[str, Any] | None) -> Side:
        """Read `state`; None is of a time when nothing was kept, so everything is unknown.

        Raises:
            ConfigError: It holds a convention that does not exist.
        """
        if state is None:
            return cls(where, UNKNOWN)
        pictures = state["pictures"]
        sizes = None if pictures is None else {name: (rows, columns) for name, (rows, columns) in pictures.items()}
        convention = None if state["convention"] is None else read_convention(where, state["convention"])
        # Older checkpoints lack the rest.
        vectors, bounds = state.get("vectors"), state.get("bounds")
        return cls(
            where, convention, sizes, state["control_hz"], state.get("vocabularies"),
            None if vectors is None else {name: (size, meaning) for name, (size, meaning) in vectors.items()},
            state.get("numbers"), None if bounds is None else (bounds[0], bounds[1]),
        )  # fmt: skip


def vocabularies_of(observation: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Entry -> vocabulary, of those whose ids have one with a name."""
    return {name: entry.vocabulary for name, entry in observation.items() if entry.vocabulary}


def vectors_of(observation: Mapping[str, TensorSpec]) -> dict[str, tuple[int, str]]:
    """Entry -> size and meaning, of those that are rows of real numbers."""
    return {
        name: (entry.shape[0], entry.meaning)
        for name, entry in observation.items()
        if entry.dtype.is_floating_point and len(entry.shape) == 1
    }


def read_convention(where: str, data: object, size: int | None = None) -> Convention:
    """A convention from plain data.

    Args:
        where: Of the data, for messages.
        data: Item -> value, see `Convention`.
        size: Numbers of the action, where they are known.

    Raises:
        ConfigError: It is none, or not of so many numbers; says what is wrong.
    """
    try:
        convention = Convention.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        told = f"{at}: {first['msg']}" if at else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: its action's convention is wrong: {told}") from None
    if size is not None and (misfit := convention.misfit(size)):
        raise ConfigError(f"{where}: {misfit}; correct one of them")
    return convention


def conform(found: Side, wanted: Side, advice: str, *, despite: Sequence[Item] = ()) -> tuple[str, ...]:
    """Make sure that what was learned on one side can be played on the other; the log tells the report.

    Args:
        found: Where the numbers come from.
        wanted: Where they are going to be taken.
        advice: What to do about a difference, for the message.
        despite: Items that may differ.

    Returns:
        report: What is the same, unknown or different all the same, one sentence each.

    Raises:
        CapabilityError: They mean different things by a number or an id, an action or a vector has another size, or
            only one side shows a picture or a vector; says both sides.
        ConfigError: `despite` names what does not differ.
    """
    report = [*_actions(found, wanted, advice, despite), *_pictures(found, wanted, advice), *_words(found, wanted)]
    report += [*_vectors(found, wanted, advice), *_numbers(found, wanted, advice)]
    hz = (found.control_hz, wanted.control_hz)
    if hz[0] and hz[1] and hz[0] != hz[1]:
        report.append(f"{found.where} has {hz[0]:g} control steps per second, {wanted.where} {hz[1]:g}")
    for line in report:
        log.info("%s", line)
    return tuple(report)


def _actions(found: Side, wanted: Side, advice: str, despite: Sequence[Item]) -> list[str]:
    a, b = found.convention, wanted.convention
    agreement: dict[Item, Agreement] = {} if a is None or b is None else compare(a, b)
    idle = [item for item in despite if agreement.get(item) != "differs"]
    if idle:
        raise ConfigError(
            f"start_despite ({idle[0]}) does nothing, because {found.where} and {wanted.where} do not differ in that: "
            "remove it"
        )
    if a is None or b is None:
        return []
    differing = {
        item: f"{item} is {getattr(a, item)} in {found.where} and {getattr(b, item)} in {wanted.where}"
        for item, state in agreement.items()
        if state == "differs"
    }
    refused = [sides for item, sides in differing.items() if item not in despite]
    if refused:
        raise CapabilityError(f"what the action's numbers mean differs: {', '.join(refused)}; {advice}")
    return [*told(agreement, (found.where, a), (wanted.where, b)), *(f"{x}, as stated" for x in differing.values())]


def told(agreement: dict[Item, Agreement], a: tuple[str, Convention], b: tuple[str, Convention]) -> list[str]:
    """What two conventions, each behind its name, have in common and what is unknown, one sentence each."""
    report = []
    same = [f"{item} ({getattr(a[1], item)})" for item, state in agreement.items() if state == "same"]
    if same:
        report.append(f"actions of {a[0]} and {b[0]} are the same in {', '.join(same)}")
    unknown = [item for item, state in agreement.items() if state == "unknown"]
    if unknown:
        silent = [where for where, said in (a, b) if any(getattr(said, item) is None for item in unknown)]
        report.append(f"what the action's numbers mean is unknown in {' and '.join(silent)}: {', '.join(unknown)}")
    return report


def _pictures(found: Side, wanted: Side, advice: str) -> list[str]:
    if found.pictures is None or wanted.pictures is None:
        return []
    return [
        f"picture '{name}' has {a[0]} x {a[1]} pixels in {found.where}, {b[0]} x {b[1]} in {wanted.where}"
        for name, a, b in _of_both("picture", (found, found.pictures), (wanted, wanted.pictures), advice)
        if a != b
    ]


def _of_both(
    kind: str, found: tuple[Side, Mapping[str, Entry]], wanted: tuple[Side, Mapping[str, Entry]], advice: str
) -> Iterator[tuple[str, Entry, Entry]]:
    """Each entry with what the two sides say of it.

    Raises:
        CapabilityError: Only one side has it: a policy would read more, or less, than it has learned from.
    """
    for name in {**found[1], **wanted[1]}:
        if name not in found[1] or name not in wanted[1]:
            (has, _), (lacks, others) = (found, wanted) if name in found[1] else (wanted, found)
            known = ", ".join(others) or "none"
            raise CapabilityError(f"{kind} '{name}' of {has.where} is not one of {lacks.where} ({known}); {advice}")
        yield name, found[1][name], wanted[1][name]


def _words(found: Side, wanted: Side) -> list[str]:
    report, theirs = [], wanted.vocabularies or {}
    for name, vocabulary in (found.vocabularies or {}).items():
        if name not in theirs:
            report.append(f"what the ids of '{name}' mean is unknown in {wanted.where}")
        elif theirs[name] != vocabulary:
            raise CapabilityError(
                f"what the ids of '{name}' mean differs: '{vocabulary}' in {found.where} and '{theirs[name]}' in "
                f"{wanted.where}, and words are known by their ids alone; use the env that it was made for"
            )
    silent = [name for name in theirs if name not in (found.vocabularies or {})]
    return report + [f"what the ids of '{name}' mean is unknown in {found.where}" for name in silent]


def _vectors(found: Side, wanted: Side, advice: str) -> list[str]:
    if found.vectors is None or wanted.vectors is None:
        return []
    report, same = [], []
    for name, a, b in _of_both("vector", (found, found.vectors), (wanted, wanted.vectors), advice):
        if a[0] != b[0]:
            raise CapabilityError(
                f"vector '{name}' has {a[0]} numbers in {found.where} and {b[0]} in {wanted.where}; {advice}"
            )
        if a[1] and b[1] and a[1] != b[1]:
            report.append(f"vector '{name}' is '{a[1]}' in {found.where} and '{b[1]}' in {wanted.where}")
        else:
            same.append(f"{name} ({a[0]})")
    if same:
        report.append(f"vectors of {found.where} and {wanted.where} are the same: {', '.join(same)}")
    return report


def _numbers(found: Side, wanted: Side, advice: str) -> list[str]:
    if found.numbers is None or wanted.numbers is None:
        return []
    if found.numbers != wanted.numbers:
        raise CapabilityError(
            f"an action has {found.numbers} numbers in {found.where} and {wanted.numbers} in {wanted.where}; {advice}"
        )
    report = [f"actions of {found.where} and {wanted.where} have {found.numbers} numbers each"]
    a, b = found.bounds, wanted.bounds
    if a and b and a != b:
        cut = "; what is beyond is cut" if a[0] < b[0] or a[1] > b[1] else ""
        report.append(
            f"the action's numbers run from {a[0]:.3g} to {a[1]:.3g} in {found.where}, from {b[0]:.3g} to {b[1]:.3g} "
            f"in {wanted.where}{cut}"
        )
    return report


def stated(where: str, own: Convention | None, said: Convention) -> Convention:
    """An env's own convention, filled with what a recipe says where the env is silent.

    Raises:
        ConfigError: The recipe says what the env says itself.
    """
    own = own or UNKNOWN
    for item in ITEMS:
        if getattr(own, item) is not None and getattr(said, item) is not None:
            raise ConfigError(
                f"{where}: convention says {item} ({getattr(said, item)}), and the env says so itself "
                f"({getattr(own, item)}): remove it"
            )
    known = {item: getattr(said, item) if getattr(own, item) is None else getattr(own, item) for item in ITEMS}
    return read_convention(where, known)
