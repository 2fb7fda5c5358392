"""Schedule-free optimizers. They need torch only and work in any training loop."""

from hf_schedulefree.optim.adamw import AdamWScheduleFree
from hf_schedulefree.optim.base import ScheduleFreeOptimizer
from hf_schedulefree.optim.radam import RAdamScheduleFree
from hf_schedulefree.optim.sgd import SGDScheduleFree

__all__ = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "ScheduleFreeOptimizer"]
