"""The plain numbers of one step."""

from typing import NamedTuple

from hf_schedulefree.optim.directions import Direction


class StepNumbers(NamedTuple):
    """What all parameters of a group share at one step.

    Args:
        lr: the step's learning rate.
        beta: the interpolation factor between z (0) and x (1).
        c: the weight of z_{t+1} in x_{t+1}.
        weight_decay: taken at y.
        direction: the base optimizer's numbers.
    """

    lr: float
    beta: float
    c: float
    weight_decay: float
    direction: Direction
