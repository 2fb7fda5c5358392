"""Starts the workers of the tests with several processes, and waits for what they leave."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TIMEOUT = 600


def needs_its_engine(engine):
    if "zero" in engine and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; scripts/test.sh installs it")
    if engine == "fsdp2-native" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("the Trainer knows models that transformers sharded from transformers 5.19 on")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(engine, folder, parts, processes, nodes=1):
    """Start the worker once per process, as torchrun does, and wait for the results of all."""
    of_a_node = processes // nodes
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(of_a_node),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once: memory.py measures it
    }
    done = [folder / f"done_{rank}" for rank in range(processes)]
    for mark in done:
        mark.unlink(missing_ok=True)
    workers = []
    for rank in range(processes):
        with open(folder / f"log_{rank}.txt", "w") as log:
            workers.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "run.py"), engine, str(folder), *parts],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % of_a_node)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            if any(worker.poll() not in (None, 0) for worker in workers) and not all(mark.exists() for mark in done):
                time.sleep(2)  # let the others say what they have to say
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if not all(mark.exists() for mark in done):
        tails = "\n".join((folder / f"log_{rank}.txt").read_text()[-3000:] for rank in range(processes))
        pytest.fail(f"{engine} on {processes} processes did not finish:\n{tails}")
    return [json.loads((folder / f"results_{rank}.json").read_text()) for rank in range(processes)]
