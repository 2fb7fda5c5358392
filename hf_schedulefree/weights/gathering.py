"""`Gathering`: whole tensors, of which processes hold parts, one at a time and only while one is written to a file."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_schedulefree.checkpoint.deferred import DeferredTensor
from hf_schedulefree.checkpoint.files import is_write_error

# What a process says in a round: which tensor it wants; or that it is done, and what went wrong, if anything.
_Message = tuple[Literal["wants", "done", "could not write", "failed"], int | str | None]


class WriteErrorElsewhere(OSError):
    """Another process could not write its files."""


class Gathering:
    """Whole tensors of a model or an optimizer, of which the processes hold parts.

    While it is `open`, `content` can be written: the tensors in it are gathered when they are needed. Processes that
    have nothing (more) to write give their parts at its end. They go in rounds: in each, everybody says what it wants,
    and all gather that together. So nobody needs to know in which order files are written, and a process that fails in
    writing leaves no other one waiting.

    Args:
        parts: dictionaries and lists with tensors and other values, the same in all processes but for the parts.
        whole: makes a whole tensor of a part, on the CPU, all processes together; it is kept where it is wanted only.
        shape: of the whole tensor, where a part does not know it.
        joint: whether the processes need each other for it.

    Attributes:
        content: as `parts`, with deferred whole tensors.
    """

    def __init__(
        self,
        parts: Any,
        whole: Callable[[Tensor, bool], Tensor | None],
        *,
        shape: Callable[[Tensor], torch.Size] = lambda part: part.shape,
        joint: bool = True,
    ):
        self._leaves, structure = tree_flatten(parts)
        self._whole = whole
        self._joint = joint and distributed.is_initialized() and distributed.get_world_size() > 1
        deferred = [
            DeferredTensor(torch.empty(shape(leaf), dtype=leaf.dtype, device="meta"), partial(self._tensor, index))
            if isinstance(leaf, Tensor)
            else leaf
            for index, leaf in enumerate(self._leaves)
        ]
        self.content = tree_unflatten(deferred, structure)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """All processes enter it; whoever comes to its end serves those that still write.

        Raises:
            WriteErrorElsewhere: another process could not write inside.
            RuntimeError: another process failed inside for another reason.
        """
        if not self._joint:
            yield
            return
        failure: Exception | None = None
        said: _Message = ("done", None)
        try:
            yield
        except Exception as error:
            failure = error
            said = ("could not write" if is_write_error(error) else "failed", f"{type(error).__name__}: {error}")
        messages = [("wants", 0)]
        while any(kind == "wants" for kind, _ in messages):
            _, messages = self._round(said)
        if failure is not None:
            raise failure
        failures = [f"process {rank}: {text}" for rank, (kind, text) in enumerate(messages) if kind != "done"]
        if failures:
            writing = all(kind in ("done", "could not write") for kind, _ in messages)
            raise (WriteErrorElsewhere if writing else RuntimeError)("; ".join(failures))

    def _tensor(self, index: int) -> Tensor:
        if not self._joint:
            return self._whole(self._leaves[index], True)
        tensor, _ = self._round(("wants", index))
        return tensor

    def _round(self, said: _Message) -> tuple[Tensor | None, list[_Message]]:
        messages: list[_Message] = [said] * distributed.get_world_size()
        distributed.all_gather_object(messages, said)
        mine = None
        for index in dict.fromkeys(index for kind, index in messages if kind == "wants"):
            wanted = said == ("wants", index)
            tensor = self._whole(self._leaves[index], wanted)
            mine = tensor if wanted else mine
            del tensor  # before the next one is gathered
        return mine, messages
