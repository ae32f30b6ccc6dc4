"""Schedules of a pipeline as data: which rank does what, in which order, and nothing about when.

A schedule is one list of actions per rank, and the rank works through its list from the left. The runtime,
the simulator and the builders share this one description, and a table in a file can say it too. ``1F3`` is
stage 1, forward, microbatch 3::

    rank 0   0F0  0F1  0F2            0B0  0F3  0B1       0B2       0B3
    rank 1        1F0  1B0  1F1  1B1  1F2  1B2  1F3  1B3

    activations  0F3 -> 1F3     gradients  1B3 -> 0B3

A backward is one action, ``B``, or two: ``I`` computes the gradient of the stage's input, which the stage
before waits for, and ``W``, some time later, those of its parameters, which nobody waits for.

Invariant: a schedule that passes :meth:`Schedule.check` has every action of every microbatch exactly once,
each stage on one rank, and every rank's own list in a possible order. Whether the lists fit each other, or
deadlock, is what the simulator finds out.
"""

from __future__ import annotations

import csv
import operator
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from hpcpar.errors import ScheduleError

__all__ = ["Action", "Kind", "Message", "Schedule", "messages"]


class Kind(Enum):
    """What an action does; the value is the letter in its name."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a slow call per look-up


SENDS_GRADIENT = (Kind.BACKWARD, Kind.BACKWARD_INPUT)

_CELL = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")
_EXAMPLES = "Write stage, kind (F, B, I or W) and microbatch, as in 1F3"


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does: a kind of work, for a stage, on a microbatch. ``str`` gives ``1F3``.

    Raises
    ------
    ScheduleError
        When ``kind`` is not a :class:`Kind`, or a number is not an integer of at least 0.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __post_init__(self) -> None:
        if type(self.kind) is not Kind:
            raise ScheduleError(f"kind of an action must be a Kind, got {self.kind!r}")
        for name, number in (("stage", self.stage), ("microbatch", self.microbatch)):
            if type(number) is not int or number < 0:
                raise ScheduleError(f"{name} of an action must be an integer of at least 0, got {number!r}")

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``text`` names, such as ``"1F3"``; blanks around it do not matter. **Local.**

        Raises
        ------
        ScheduleError
            When it names none.
        """
        found = _CELL.fullmatch(text.strip())
        if found is None:
            raise ScheduleError(f"an action must be a text like 1F3, got {text!r}. {_EXAMPLES}")
        return cls(Kind(found[2]), int(found[1]), int(found[3]))


@dataclass(frozen=True, init=False, repr=False)
class Schedule:
    """What every rank does, in order. Two schedules are equal when their actions are.

    Parameters
    ----------
    actions
        For each rank its actions, or texts like ``"1F3"``; empty texts and None are left out, so that the
        lists may be written as the rows of a table.
    name
        For people: ``"1f1b"``.

    Raises
    ------
    ScheduleError
        When ``actions`` is anything else. That the schedule makes sense is for :meth:`check` to say.
    """

    actions: tuple[tuple[Action, ...], ...]
    name: str = field(default="", compare=False)

    def __init__(self, actions: Sequence[Sequence[Action | str | None]], name: str = "") -> None:
        if not isinstance(name, str):
            raise ScheduleError(f"name of a schedule must be a text, got {name!r}")
        if not _is_list(actions):
            raise ScheduleError(f"a schedule must be a list with one list per rank, got {actions!r}")
        rows = tuple(_read_row(row, rank) for rank, row in enumerate(actions))
        object.__setattr__(self, "actions", rows)
        object.__setattr__(self, "name", name)

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return f"Schedule({name}{self.ranks} rank(s), {sum(map(len, self.actions))} actions)"

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.actions)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.placement)

    @cached_property
    def microbatches(self) -> int:
        """How many microbatches a batch is cut into: the highest number, plus one."""
        return 1 + max((action.microbatch for row in self.actions for action in row), default=-1)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some backward is done in two parts, ``I`` and ``W``."""
        return any(action.kind is Kind.BACKWARD_INPUT for row in self.actions for action in row)

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The rank of each stage.

        Raises
        ------
        ScheduleError
            When a stage has actions on two ranks, or has none although a higher one has.
        """
        ranks: dict[int, int] = {}
        for rank, row in enumerate(self.actions):
            for action in row:
                if ranks.setdefault(action.stage, rank) != rank:
                    raise ScheduleError(
                        f"stage {action.stage} must be on one rank, got {action} on rank {rank} and others "
                        f"of its actions on rank {ranks[action.stage]}"
                    )
        for stage in range(len(ranks)):
            if stage not in ranks:
                raise ScheduleError(
                    f"stages must be numbered from 0 without a hole, got stage {max(ranks)} but no stage "
                    f"{stage}"
                )
        return tuple(ranks[stage] for stage in range(len(ranks)))

    @cached_property
    def _positions(self) -> dict[Action, tuple[int, int]]:
        positions: dict[Action, tuple[int, int]] = {}
        for rank, row in enumerate(self.actions):
            for index, action in enumerate(row):
                positions.setdefault(action, (rank, index))
        return positions

    def position(self, action: Action) -> tuple[int, int] | None:
        """Rank and place in its list of an action, None where no rank has it. **Local.**"""
        return self._positions.get(action)

    # ---- files ---------------------------------------------------------------------------------------------

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a table: a row per rank, cells like ``1F3``. **Local.**

        Raises
        ------
        OSError
            When the file cannot be written.
        """
        with open(path, "w", encoding="utf-8", newline="") as file:
            # A rank without actions becomes "", for an empty line would not count as a row.
            csv.writer(file).writerows([str(action) for action in row] or [""] for row in self.actions)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], name: str = "") -> Schedule:
        """Read a table: a row per rank, cells like ``1F3``. **Local.**

        Empty cells, short rows, blanks around a cell and empty lines do not matter.

        Raises
        ------
        ScheduleError
            When the file cannot be read, or names its first cell that is not an action.
        """
        shown = os.fspath(path)
        rows: list[list[Action]] = []
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file)
                for cells in reader:
                    # "" in quotes is a rank without actions; a line of nothing but blanks is no row.
                    if cells and (len(cells) > 1 or not cells[0] or not cells[0].isspace()):
                        rows.append(_parse_cells(cells, f"row {reader.line_num} of {shown}"))
        except OSError as error:
            raise ScheduleError(f"{shown} must be a readable file, got: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise ScheduleError(f"{shown} must be a CSV file in UTF-8, got: {error}") from error
        return cls(rows, name)

    # ---- correctness ---------------------------------------------------------------------------------------

    def check(
        self, ranks: int | None = None, microbatches: int | None = None, *, forward_only: bool = False
    ) -> None:
        """Raise when the schedule is incomplete or contradicts itself. **Local.**

        Parameters
        ----------
        ranks, microbatches
            How many there must be; any number by default.
        forward_only
            Whether this is a schedule of forwards without backwards.

        Raises
        ------
        ScheduleError
            Names the first problem.
        """
        problem = next(_problems(self, ranks, microbatches, forward_only), None)
        if problem is not None:
            subject = f"schedule {self.name!r}" if self.name else "the schedule"
            raise ScheduleError(f"{subject} must {problem}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _read_row(row: Any, rank: int) -> tuple[Action, ...]:
    if not _is_list(row):
        raise ScheduleError(f"the actions of rank {rank} must be a list, got {row!r}")
    actions: list[Action] = []
    for cell in row:
        if isinstance(cell, str) and cell.strip():
            actions.append(Action.parse(cell))
        elif isinstance(cell, Action):
            actions.append(cell)
        elif cell is not None and not isinstance(cell, str):
            raise ScheduleError(f"an action of rank {rank} must be an Action or a text, got {cell!r}")
    return tuple(actions)


def _parse_cells(cells: Sequence[str], where: str) -> list[Action]:
    actions: list[Action] = []
    for column, cell in enumerate(cells, 1):
        try:
            actions += [Action.parse(cell)] if cell.strip() else []
        except ScheduleError as error:
            raise ScheduleError(
                f"column {column} in {where} must be an action or empty, got {cell!r}. {_EXAMPLES}"
            ) from error
    return actions


# ---- messages ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends to another: the result of ``producer``, which ``consumer`` needs."""

    producer: Action
    consumer: Action
    source: int
    dest: int


def positive(what: str, number: object) -> int:
    """An integer of at least 1, numpy's own included. Local.

    Raises
    ------
    ScheduleError
        For anything else, ``what`` it was meant to be.
    """
    try:
        value = 0 if isinstance(number, bool) else operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        value = 0
    if value < 1:
        raise ScheduleError(f"{what} must be an integer of at least 1, got {number!r}")
    return value


def messages(schedule: Schedule) -> tuple[Message, ...]:
    """Every activation and gradient that crosses ranks, in the order in which each source sends. **Local.**

    Raises
    ------
    ScheduleError
        When something is sent that no rank receives, or received that none sends.
    """
    placement = schedule.placement
    found: list[Message] = []
    for dest, row in enumerate(schedule.actions):
        for action in row:
            source = _neighbour(action, placement, towards_input=action.kind is Kind.FORWARD)
            if source is not None and source != dest:
                producers = [made for made in _inputs(action) if schedule.position(made) is not None]
                if len(producers) != 1:
                    raise ScheduleError(
                        f"{action} on rank {dest} must have one sender, got {len(producers)} on rank {source}"
                    )
                found.append(Message(producers[0], action, source, dest))
    _check_receivers(schedule, {message.producer for message in found}, len(found))
    return tuple(sorted(found, key=lambda message: schedule.position(message.producer) or (0, 0)))


def _neighbour(action: Action, placement: Sequence[int], *, towards_input: bool) -> int | None:
    """The rank of the stage before or after, None where there is none or ``action`` has no business there."""
    stage = action.stage + (-1 if towards_input else 1)
    if action.kind is Kind.BACKWARD_WEIGHT or not 0 <= stage < len(placement):
        return None
    return placement[stage]


def _inputs(action: Action) -> list[Action]:
    """What may have made the input that ``action`` gets from another stage: one of these."""
    if action.kind is Kind.FORWARD:
        return [Action(Kind.FORWARD, action.stage - 1, action.microbatch)]
    return [Action(kind, action.stage + 1, action.microbatch) for kind in SENDS_GRADIENT]


def _check_receivers(schedule: Schedule, producers: set[Action], count: int) -> None:
    if len(producers) != count:
        raise ScheduleError(
            f"every send must have one receive, got {len(producers)} sends and {count} receives"
        )
    for rank, row in enumerate(schedule.actions):
        for action in row:
            dest = _neighbour(action, schedule.placement, towards_input=action.kind is not Kind.FORWARD)
            if dest is not None and dest != rank and action not in producers:
                raise ScheduleError(f"{action} on rank {rank} must have a receiver, got none on rank {dest}")


# ---- what check() looks for --------------------------------------------------------------------------------

_COMPLETE = (
    {Kind.FORWARD},
    {Kind.FORWARD, Kind.BACKWARD},
    {Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT},
)
_ORDER = (
    (Kind.FORWARD, Kind.BACKWARD),
    (Kind.FORWARD, Kind.BACKWARD_INPUT),
    (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT),
)


def _problems(
    schedule: Schedule, ranks: int | None, microbatches: int | None, forward_only: bool
) -> Iterator[str]:
    """What is wrong, as the end of a sentence that begins with "schedule must"."""
    if not schedule.ranks:
        yield "have a list of actions for each rank, got none"
    if ranks is not None and schedule.ranks != ranks:
        yield f"have one list of actions per rank, {ranks}, got {schedule.ranks}"
    if microbatches is not None and schedule.microbatches != microbatches:
        yield f"be for {microbatches} microbatch(es), got one for {schedule.microbatches}"
    for rank, row in enumerate(schedule.actions):
        if not row:
            yield f"give every rank a stage, got no actions for rank {rank}. Use fewer ranks, or more stages"
    places: dict[tuple[int, int], dict[Kind, int]] = {}
    for rank, row in enumerate(schedule.actions):
        for index, action in enumerate(row):
            place = places.setdefault((action.stage, action.microbatch), {})
            # A second time on another rank is left to `placement`, which says so.
            if place.setdefault(action.kind, index) != index and schedule.placement:
                yield f"name every action once, got {action} twice on rank {rank}"
            if forward_only and action.kind is not Kind.FORWARD:
                yield f"have forwards only, got {action} on rank {rank}"
    complete = _COMPLETE[:1] if forward_only else _COMPLETE[1:]
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            place = places.get((stage, microbatch), {})
            if place.keys() not in complete:
                yield from _missing(place, stage, microbatch, forward_only)
            yield from _out_of_order(place, stage, microbatch)


def _missing(place: dict[Kind, int], stage: int, microbatch: int, forward_only: bool) -> Iterator[str]:
    """What a stage does not do, or does twice, with a microbatch; ``place`` has what it does."""
    forward, whole, first, second = (Action(kind, stage, microbatch) for kind in Kind)
    if Kind.FORWARD not in place:
        yield f"be complete, but stage {stage} has no forward of microbatch {microbatch}. Add {forward}"
    if forward_only:
        return
    parts = [action for action in (first, second) if action.kind in place]
    if Kind.BACKWARD in place and parts:
        yield f"do each backward once, got {whole} and also {parts[0]}"
    if Kind.BACKWARD not in place and not parts:
        yield (
            f"be complete, but stage {stage} has no backward of microbatch {microbatch}. Add {whole}, or "
            f"{first} and {second}"
        )
    if len(parts) == 1:
        other = second if parts == [first] else first
        yield f"do a split backward in two parts, got {parts[0]} without {other}"


def _out_of_order(place: dict[Kind, int], stage: int, microbatch: int) -> Iterator[str]:
    for early, late in _ORDER:
        if early in place and late in place and place[late] < place[early]:
            names = (f"{stage}{kind.value}{microbatch}" for kind in (early, late))
            yield "have {0} before {1}, got {1} first".format(*names)
