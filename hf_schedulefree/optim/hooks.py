"""What is around the methods of an optimizer: torch's hooks and records for profilers; no compiler.

torch wraps the `step` of every optimizer class. To record a step for a profiler that does not run, and to look through
empty lists of hooks, takes as long as a tenth of a small model's step: so that is done where somebody asks for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def profile_hook_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that takes the way around which torch leads it if it is watched, and else the direct one.

    With a closure it takes that way, too: the closure may register hooks. Observers of execution traces are not seen.
    """
    watched = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    @never_compiled
    def step_or_watched(*args: Any, **options: Any) -> Any:
        return (watched if options or len(args) > 1 or is_watched(args[0]) else step)(*args, **options)

    return step_or_watched


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs as it is inside what torch.compile has compiled, which cannot look into the kernels.

    It does what `torch.compiler.disable` does, which would import the compiler when this module is imported.
    """

    def as_it_is(*args: Any, **options: Any) -> Any:
        return torch._dynamo.disable(function)(*args, **options)

    as_it_is._torchdynamo_disable = True

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        return (as_it_is if torch.compiler.is_compiling() else function)(*args, **options)

    return run


def is_watched(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer has hooks, or a profiler runs (one of this thread, or of any)."""
    return bool(
        _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or profiler._is_profiler_enabled
        or torch.autograd._profiler_enabled()
    )
