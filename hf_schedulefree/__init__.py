"""Schedule-Free training with the Hugging Face Trainer: the right weights to every reader.

Importing the package registers the optimizer names: from then on `TrainingArguments(optim="adamw_schedulefree")` works.
"""

from hf_schedulefree.collector import full_collections_postponed

with full_collections_postponed():
    from hf_schedulefree.callbacks import BatchNormRecalibrationCallback, SampleGenerationCallback
    from hf_schedulefree.registry import register_optimizers
    from hf_schedulefree.trainer import ScheduleFreeMixin, ScheduleFreeSeq2SeqTrainer, ScheduleFreeTrainer
    from hf_schedulefree.weights import averaged_weights

__version__ = "0.1.0"

__all__ = [
    "BatchNormRecalibrationCallback",
    "SampleGenerationCallback",
    "ScheduleFreeMixin",
    "ScheduleFreeSeq2SeqTrainer",
    "ScheduleFreeTrainer",
    "__version__",
    "averaged_weights",
    "register_optimizers",
]

register_optimizers()
