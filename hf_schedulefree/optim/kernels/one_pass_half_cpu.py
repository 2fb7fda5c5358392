"""The step for bfloat16 parameters on CPU in one pass over memory, for each way to store the state.

The storage and the random numbers are those of `precision`, element by element the same; the arithmetic is that of
`one_pass_cpu`, in float32 and strict IEEE, so that results do not depend on threads, alignment or sharding. The loops
are in `sources/half_step.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hf_schedulefree.optim import precision
from hf_schedulefree.optim.kernels import jobs
from hf_schedulefree.optim.kernels.numbers import DenseRow, ReadyStep, StepNumbers
from hf_schedulefree.optim.kernels.one_pass_cpu import NUMBERS, kind_of, numbers_of
from hf_schedulefree.optim.kernels.workers import worker


def prepare(rows: Sequence[DenseRow]) -> ReadyStep:
    """A `numbers.Kernel` for bfloat16 parameters on CPU; no index crosses a multiple of 2^32."""
    y, y_low, z, v, first, keys = zip(*rows, strict=True)
    blocks = jobs.Blocks([tensor.numel() for tensor in y])
    # A tensor that there is not is never touched; any address will do.
    columns = (y, y if y_low[0] is None else y_low, z, z if v[0] is None else v, y)
    job = blocks.job(columns, NUMBERS, blocks.first, blocks.first)
    gradients = jobs.Column(job, 4, blocks, y[0].element_size())
    is_random = keys[0] is not None
    storage = y_low[0] is not None, z[0].dtype == torch.float32, is_random
    if is_random:
        seed, parameters = (np.array([precision.wrapped(key[i]) for key in keys]) for i in range(2))
        if (seed == seed[0]).all():
            seed = int(seed[0])  # numpy takes its time for each operation
        first = blocks.of(first) + blocks.first

    def step_(grads: Sequence[int], numbers: StepNumbers) -> None:
        gradients.show(grads)
        if is_random:
            key = tuple(map(blocks.of, precision.rounding_key(seed, numbers.k, parameters)))
            job.table[:, 6], job.table[:, 7] = precision.first_hash(key, first), key[1]
        job.run(worker("half_step.step", *storage, kind_of(numbers)), numbers_of(numbers))
        torch.autograd.graph.increment_version(y)  # autograd must notice, as for torch's operations

    return step_
