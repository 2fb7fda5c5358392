"""x from y and z on CPU in one pass over memory, without temporaries: the bits of `averaging.x_from_y`.

Strict IEEE as in `one_pass_cpu`: subtraction, product and sum are rounded one by one. The loop is in
`sources/switch.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_schedulefree.optim.kernels import jobs
from hf_schedulefree.optim.kernels.workers import dtype_name, worker


def show_x_(
    p: Sequence[Tensor],
    y: Sequence[Tensor],
    z: Sequence[Tensor],
    beta: float,
    y_low: Sequence[Tensor] = (),
) -> None:
    """Write x into `p`; contiguous CPU tensors of one dtype (float32, float64 or bfloat16).

    bfloat16 may have `y_low` (see `precision`), and z in float32.
    """
    _run(p, y, z, beta, y_low, compares=False)
    torch.autograd.graph.increment_version(p)


def x_in_parts(y: Tensor, z: Tensor, beta: float, y_low: Tensor | None = None) -> Callable[[int, Tensor], None]:
    """What writes x, from any element on, into another tensor: in the calling thread, in few microseconds besides.

    Tensors as for `show_x_`. They are kept, and asked at each call where they are: their storage may move, into memory
    that is shared with other processes, say.
    """
    work = worker("switch.write", dtype_name(y), False, y_low is not None, z.dtype != y.dtype)
    low = y if y_low is None else y_low
    y_size, z_size, low_size = (t.element_size() for t in (y, z, low))
    weight = 1 - 1 / beta

    def write(first: int, into: Tensor) -> None:
        places = y.data_ptr() + y_size * first, z.data_ptr() + z_size * first, low.data_ptr() + low_size * first
        jobs.run_row(work, (into.data_ptr(), *places, into.numel()), weight)

    return write


def holds_x(
    p: Sequence[Tensor], y: Sequence[Tensor], z: Sequence[Tensor], beta: float, y_low: Sequence[Tensor] = ()
) -> bool:
    """Whether `p` holds exactly x (a NaN is any NaN; 0.0 is not -0.0); tensors as for `show_x_`."""
    return _run(p, y, z, beta, y_low, compares=True) == 0


def _run(
    p: Sequence[Tensor],
    y: Sequence[Tensor],
    z: Sequence[Tensor],
    beta: float,
    y_low: Sequence[Tensor],
    *,
    compares: bool,
) -> int:
    job = jobs.Blocks([tensor.numel() for tensor in p]).job((p, y, z, y_low or y), 1)
    work = worker("switch.write", dtype_name(p[0]), compares, bool(y_low), z[0].dtype != p[0].dtype)
    return job.run(work, (1 - 1 / beta,))
