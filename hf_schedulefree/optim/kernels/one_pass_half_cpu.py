"""The step for bfloat16 parameters on CPU in one pass over memory, for each way to store the state.

The storage and the random numbers are those of `precision`, element by element the same; the arithmetic is that of
`one_pass_cpu`, in float32 and strict IEEE, so that results do not depend on threads, alignment or sharding. The loops
are in `sources/half_step.py`.
"""

from collections.abc import Sequence

import torch

from hf_schedulefree.optim import precision
from hf_schedulefree.optim.kernels import jobs
from hf_schedulefree.optim.kernels.numbers import DenseRow, ReadyStep
from hf_schedulefree.optim.kernels.one_pass_cpu import NUMBERS, OnePass, kind_of, numbers_of
from hf_schedulefree.optim.kernels.workers import worker


def prepare(rows: Sequence[DenseRow]) -> ReadyStep:
    """A `numbers.Kernel` for bfloat16 parameters on CPU; no index crosses a multiple of 2^32."""
    y, y_low, z, v, first, keys = zip(*rows, strict=True)
    blocks = jobs.Blocks([tensor.numel() for tensor in y])
    is_random = keys[0] is not None
    seeds, parameters = ([precision.wrapped(key[i]) if is_random else 0 for key in keys] for i in range(2))
    # A tensor that there is not is never touched; any address will do.
    columns = (y, y if y_low[0] is None else y_low, z, z if v[0] is None else v, y)
    others = (blocks.of(first) + blocks.first, blocks.of(seeds), blocks.of(parameters))
    job = blocks.job(columns, NUMBERS + 1, *others)
    gradients = jobs.Column(job, 4, blocks, y[0].element_size())
    storage = y_low[0] is not None, z[0].dtype == torch.float32, is_random
    return OnePass(
        *(y, job, gradients),
        lambda numbers: worker("half_step.step", *storage, kind_of(numbers)),
        lambda numbers: (*numbers_of(numbers), numbers.k),
    )
