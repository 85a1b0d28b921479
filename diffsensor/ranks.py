"""The processes of one run: what they tell each other at a look, so that all of them come to the same end."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from diffsensor.errors import RanksError
from diffsensor.protocols import Schedule

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Message(NamedTuple):
    """What one process has to say: about what, the thing itself, or why it has nothing."""

    about: str
    value: Any = None
    failure: str = ""


@final
class Ranks:
    """All processes of the run, or this one alone where torch.distributed is not in use.

    Everything that is exchanged goes through a gloo group of our own: it cannot be mixed up with the collectives of the
    training, waits for no GPU stream, and carries small things. Each message says what it is about: a process that
    failed sends that instead, so that no other one waits for it. What cannot be contained is a process that hangs
    inside a collective of the model itself, or dies: then the others wait as long as the group's timeout says, as they
    would without us.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        # Torch holds it, until it is destroyed. Held here too, it would outlive that, and abort the process at its end.
        self._held = None if group is None else weakref.ref(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._depth = 0  # of what is being made, one inside the other
        self._has_failed = False  # the others were told, and need not be told again on the error's way up

    @property
    def _group(self) -> "dist.ProcessGroup | None":
        """None for a process alone."""
        if self._held is None:
            return None
        if (group := self._held()) is None:
            raise RanksError("The process group of this run was destroyed, so its processes cannot reach each other.")
        return group

    @classmethod
    def now(cls) -> "Ranks":
        """The processes there are now. A call that all of them must make, the first time it is made."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return _ALONE
        world = dist.group.WORLD
        assert world is not None
        if _known is None or _known[0]() is not world:
            _remember(world, cls(dist.new_group(backend="gloo")))
        assert _known is not None
        return _known[1]

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, and that writes."""
        return self.rank == 0

    def each(self, about: str, value: T) -> list[T]:
        """What every process has, in order of rank.

        Raises `RanksError` where another one failed, or is somewhere else altogether.
        """
        if self._group is None:
            return [value]
        return [message.value for message in self._exchange(_Message(about, value))]

    def told(self, about: str, make: Callable[[], T]) -> T:
        """What the first process makes, for all of them."""
        made = self._made(about, make) if self.is_first else None
        return self.each(about, made)[0]  # type: ignore[return-value]

    def together(self, about: str, act: Callable[[], T]) -> T:
        """Do something in all processes, or fail in all of them: with the same error, as a sentence."""
        result = self._made(about, act)
        self.each(about, None)
        return result

    def _made(self, about: str, make: Callable[[], T]) -> T:
        self._depth += 1
        try:
            return make()
        except RanksError:
            raise  # the others know it already
        except Exception as error:
            if self._group is not None and not self._has_failed:
                self._has_failed = True
                self._tell(_Message(about, failure=f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._has_failed = False

    def summed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Added up over the processes, for the first one; the others get back what they gave.

        All must have tensors of the same names, shapes and dtypes. Exact for whatever only one of them has filled in.
        """
        if self._group is None:
            return dict(tensors)
        result = {}
        for name in sorted(tensors):
            given = tensors[name]
            # Not every kind of number can be added by gloo; to float32 and back is exact for the smaller ones.
            wide = torch.float32 if given.dtype in (torch.bfloat16, torch.float16) else given.dtype
            moving = given.detach().to("cpu", wide, copy=True).contiguous()
            dist.reduce(moving, group_dst=0, group=self._group)
            result[name] = moving.to(given.device, given.dtype) if self.is_first else given
        return result

    def _exchange(self, mine: _Message) -> list[_Message]:
        messages = self._tell(mine)
        for rank, message in enumerate(messages):
            if message.failure:
                raise RanksError(f"Process {rank} of {self.size} failed ({message.failure}).")
        if others := sorted({message.about for message in messages} - {mine.about}):
            raise RanksError(
                f"Process {self.rank} of {self.size} is at {mine.about!r} and another one at {others[0]!r}. All "
                "processes must call the monitor, with the same arguments and at the same steps."
            )
        return messages

    def _tell(self, mine: _Message) -> list[_Message]:
        messages: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(messages, tuple(mine), group=self._group)
        except (RuntimeError, ValueError) as error:  # a process is gone, or too late
            raise RanksError(f"The processes of this run cannot reach each other any more ({error}).") from error
        return [_Message(*message) for message in messages]


_ALONE = Ranks()
_known: "tuple[weakref.ref[dist.ProcessGroup], Ranks] | None" = None


def _remember(world: "dist.ProcessGroup", ranks: Ranks) -> None:
    global _known
    _known = (weakref.ref(world), ranks)


@final
class Due:
    """Which steps a schedule names. The first process decides, and tells the others ahead."""

    #: How far ahead the others are told, where no step is due before.
    _AHEAD = 256

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._known = range(0)
        self._next = -1

    def at(self, step: int) -> bool:
        """Whether this step is due. All processes ask, at the same steps; most answers cost no exchange."""
        ranks = Ranks.now()
        if ranks.size == 1:
            return self._schedule(step)
        if step not in self._known:
            self._next = ranks.told(f"what is due from step {step}", partial(self._search, step))
            self._known = range(step, (self._next if self._next >= 0 else step + self._AHEAD - 1) + 1)
        return step == self._next

    def _search(self, step: int) -> int:
        return next((each for each in range(step, step + self._AHEAD) if self._schedule(each)), -1)


def mean_of(values: Sequence[float]) -> float:
    """The mean, and the value itself where all are the same, which a division could round away from."""
    return values[0] if all(value == values[0] for value in values) else sum(values) / len(values)
