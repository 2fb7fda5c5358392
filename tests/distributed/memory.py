"""How much memory a process needs at most to show x, to evaluate, and to save."""

import contextlib

# Many weights of one size: a whole copy of the model is far more than the few that are gathered at a time. Each is
# large enough to be given back to the system at once when it is freed (MALLOC_MMAP_THRESHOLD_, see launching.py).
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 12}


def resident(line):
    with open("/proc/self/status") as status:
        return 1024 * int(next(text for text in status if text.startswith(line)).split()[1])


@contextlib.contextmanager
def peak_of(found, name, unit):
    """Puts the most that was resident at one time inside the block, beyond what was there before it, into `found`."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = resident("VmRSS")
    yield
    found[name] = round((resident("VmHWM") - before) / unit, 3)


def memory(lab):
    """In copies of the model, beyond what is held before. The parked y is one, spread over the processes."""
    options = {"gradient_accumulation_steps": 1, "max_steps": 2, **lab.engine.memory_options()}
    trainer = lab.trainer("memory", model_sizes=SIZES, **options)
    trainer.train()
    model = 4 * sum(getattr(p, "ds_shape", p.shape).numel() for p in trainer.model.parameters())
    folder, found = str(lab.folder / "memory_saved"), {}
    for _ in range(2):  # the first time loads modules, too
        with trainer.training_weights():
            with peak_of(found, "show", model), trainer.averaged_weights():
                pass
            with peak_of(found, "evaluate", model):
                trainer.evaluate()
        with peak_of(found, "save_model", model):
            trainer.save_model(folder)
        with peak_of(found, "checkpoint", model):
            trainer._save_checkpoint(trainer.model, None)
    lab.keep("memory", found)
