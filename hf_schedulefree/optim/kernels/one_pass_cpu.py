"""The step on CPU in one pass over memory: reads y, z, v, g, writes y, z, v, allocates nothing.

Imported only when a step is to be made; `kernels` falls back on `torch_ops` where numba is missing. The loops are in
`sources/step.py`, and compiled at the first step of a dtype, once per machine (see `workers`).

The arithmetic is strict IEEE (no fused multiply-add, no reordering): results do not depend on the number of threads,
on alignment, or on how parameters are split between processes.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hf_schedulefree.optim.kernels import jobs
from hf_schedulefree.optim.kernels.numbers import DenseRow, ReadyStep, StepNumbers
from hf_schedulefree.optim.kernels.threads import Work
from hf_schedulefree.optim.kernels.workers import dtype_name, worker

# How many numbers a step needs: see `numbers_of`.
NUMBERS = 7

# What to do with the gradient.
PLAIN, COLLECT, NORMALIZE = 0, 1, 2


def prepare(rows: Sequence[DenseRow]) -> ReadyStep:
    """A `numbers.Kernel` for parameters on CPU in float32, float64 or bfloat16; no index crosses a multiple of 2^32."""
    y, _, z, v, *_ = zip(*rows, strict=True)
    if y[0].dtype == torch.bfloat16:
        return importlib.import_module(".one_pass_half_cpu", __package__).prepare(rows)
    blocks = jobs.Blocks([tensor.numel() for tensor in y])
    # A tensor that there is not is never touched; any address will do.
    job = blocks.job((y, z, y if v[0] is None else v, y), NUMBERS)
    gradients, dtype = jobs.Column(job, 3, blocks, y[0].element_size()), dtype_name(y[0])
    return OnePass(y, job, gradients, lambda numbers: worker("step.step", dtype, kind_of(numbers)), numbers_of)


class OnePass:
    """A `numbers.ReadyStep`: of the first tensors, while the addresses of the next gradients are asked for.

    Args:
        y: the parameters.
        job: its table has the blocks of all tensors.
        gradients: the column of that table which changes.
        worker_for: what works on a step with such numbers.
        numbers_for: what it is told of them.
    """

    def __init__(
        self,
        y: Sequence[Tensor],
        job: jobs.Job,
        gradients: jobs.Column,
        worker_for: Callable[[StepNumbers], Work],
        numbers_for: Callable[[StepNumbers], Sequence[float]],
    ):
        self._y, self._job, self._gradients = y, job, gradients
        self.overlaps = job.threads > 1
        self._worker_for, self._numbers_for = worker_for, numbers_for
        self._latest: StepNumbers | None = None
        self._known = 0  # tensors whose addresses it was given for the latest step

    def __call__(self, batches: Iterable[Sequence[int]], numbers: StepNumbers) -> None:
        work, plain = self._worker_for(numbers), self._numbers_for(numbers)
        self._job.forget()
        self._known, self._latest = 0, numbers
        self._job.run(work, plain, ready=self._rows(batches))

    def _rows(self, batches: Iterable[Sequence[int]]) -> Iterator[int]:
        first = 0
        for addresses in batches:
            rows, last = self._gradients.show(first, addresses), first + len(addresses)
            torch.autograd.graph.increment_version(self._y[first:last])  # as torch's own operations do, for autograd
            self._known = first = last
            yield rows

    def stepped(self, numbers: StepNumbers) -> int:
        if numbers is not self._latest:
            return 0
        return min(self._known, self._gradients.tensors(self._job.done))  # those without elements have no rows


def kind_of(numbers: StepNumbers) -> int:
    """What the step does with the gradient."""
    direction = numbers.direction
    return PLAIN if direction.beta2 is None else NORMALIZE if direction.normalizes else COLLECT


def numbers_of(numbers: StepNumbers) -> tuple[float, ...]:
    """lr, the factor on d in y, c, weight decay, beta2, 1 / bias correction, eps."""
    lr, _, c, weight_decay, direction, _ = numbers
    beta2, scale = direction.beta2 or 0.0, 1 / direction.correction
    return lr, numbers.direction_factor, c, weight_decay, beta2, scale, direction.eps
