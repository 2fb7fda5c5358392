"""What eval mode would show and store, for files, while the parameters hold y and go on to hold it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_schedulefree.optim import averaging, kernels, precision, switching
from hf_schedulefree.optim.precision import Y_LOW
from hf_schedulefree.optim.stored import stored_beta

# Elements that torch's operations, which need temporaries, take at once.
_AT_ONCE = 2**16


class AveragedPieces:
    """The averaged weights of one parameter in train mode: the very bits that `eval` would show in it.

    Args:
        p: the parameter, which holds y.
        state: its state.
        beta: the interpolation factor between z (0) and x (1).
        one_pass: whether the one-pass kernel may be used; the bits are the same.

    Attributes:
        device: of the parameter.
        by_caller_alone: whether the one-pass kernel computes it. torch's operations have other threads help.

    Raises:
        ValueError: y and z do not lie in memory as one row of elements each, in one order.
    """

    def __init__(self, p: Tensor, state: Mapping[str, Tensor], beta: float, *, one_pass: bool = True):
        stored = {name: state[name] for name in ("z", Y_LOW) if name in state}
        if not all(t.is_contiguous() and t.shape == p.shape and t.device == p.device for t in (p, *stored.values())):
            raise ValueError(f"y and z of a parameter of shape {tuple(p.shape)} are not contiguous")
        self.device = p.device
        self._y = p.detach().view(-1)
        self._state = {name: t.detach().view(-1) for name, t in stored.items()}
        self._beta = beta
        compilable = one_pass and switching.compilable(p, {**state, "y": p}) is not None
        kernel = kernels.switch_kernel() if compilable else None
        self._one_pass = (
            None if kernel is None else kernel.x_in_parts(self._y, self._state["z"], beta, self._state.get(Y_LOW))
        )
        self.by_caller_alone = self._one_pass is not None

    def read(self, first: int, into: Tensor) -> None:
        """Put the elements from `first` on (in row-major order) into `into`: flat, on CPU, in the parameter's dtype.

        Raises:
            ValueError: there are not so many elements, or `into` is of another kind.
        """
        count = into.numel()
        if not 0 <= first <= first + count <= self._y.numel():
            raise ValueError(f"elements {first} to {first + count} were asked for; there are {self._y.numel()}")
        if not (type(into) is Tensor and into.is_cpu and into.dtype == self._y.dtype and into.is_contiguous()):
            raise ValueError(f"into must be a contiguous tensor of {self._y.dtype} on CPU")
        if self._one_pass is not None:
            self._one_pass(first, into)
            return
        with torch.no_grad():
            at_once = _AT_ONCE if self.device.type == "cpu" else max(into.numel(), 1)  # to copy from a device waits
            for i, part in enumerate(into.split(at_once)):
                start = first + i * at_once
                some = slice(start, start + part.numel())
                y, state = self._y[some], {name: t[some] for name, t in self._state.items()}
                part.copy_(averaging.x_from_y(precision.wide(y, state), state["z"], self._beta).to(part.dtype))


def park(groups: Sequence[Mapping[str, Any]], state_dict: dict[str, Any]) -> None:
    """Make a `state_dict` of train mode that of eval mode: the parked y are the parameters, by reference.

    Args:
        groups: the optimizer's parameter groups; those that are not in train mode are left as they are.
        state_dict: as torch made it. Its own parts are replaced; the tensors and the optimizer are not touched.
    """
    for group, stored in zip(groups, state_dict["param_groups"], strict=True):
        if group["train_mode"] is not True:
            continue
        stored.update(train_mode=False, parked_k=int(group["k"]), parked_beta=stored_beta(group))
        for p, index in zip(group["params"], stored["params"], strict=True):
            state = state_dict["state"].get(index)
            if state and "z" in state:
                # A file would hold all of the memory that a part of it belongs to.
                alone = p.untyped_storage().nbytes() == p.numel() * p.element_size()
                y = p.detach() if alone else p.detach().clone(memory_format=torch.preserve_format)
                state_dict["state"][index] = {**state, "y": y}
