"""DeepSpeed's loader executes nothing that it finds in a file; loading to a CPU with a number."""

import pickle

import pytest
import torch

from hf_schedulefree.weights import numbered_cpu_known, only_data_loaded


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_is_refused_and_deepspeeds_own_classes_are_not(tmp_path):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    engine = TorchCheckpointEngine(None)
    scalers = [LossScaler(8.0), DynamicLossScaler(2.0**8, 100, 1.0, 1, False)]
    own = {"scalers": scalers, "stage": ZeroStageEnum(2), "at": fragment_address(1, 2)}
    torch.save({"optimizer": {"z": torch.arange(3.0)}, **own}, tmp_path / "good.pt")
    torch.save({"optimizer": Evil(tmp_path / "was here")}, tmp_path / "bad.pt")
    with only_data_loaded(True):
        loaded = engine.load(str(tmp_path / "good.pt"), map_location="cpu")
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            engine.load(str(tmp_path / "bad.pt"))
    assert torch.equal(loaded["optimizer"]["z"], torch.arange(3.0))
    assert loaded["stage"] == ZeroStageEnum(2) and loaded["scalers"][0].loss_scale == 8.0
    assert not (tmp_path / "was here").exists()
    engine.load(str(tmp_path / "bad.pt"))
    assert (tmp_path / "was here").exists()  # or the refusal would prove nothing


def test_a_cpu_with_a_number_is_the_cpu(tmp_path):
    """The real case, DDP resumed on CPU, is in `distributed`; it needs this with transformers 5.17 only."""
    torch.save({"z": torch.arange(3.0)}, tmp_path / "optimizer.pt")
    numbered_cpu_known()
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu:1"), weights_only=True)["z"]
    assert loaded.device == torch.device("cpu") and torch.equal(loaded, torch.arange(3.0))
    with pytest.raises(RuntimeError, match="restore data location"):
        torch.load(tmp_path / "optimizer.pt", map_location="nowhere:0", weights_only=True)
