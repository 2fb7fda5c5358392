"""DeepSpeed's loader executes nothing that it finds in a file."""

import pickle

import pytest
import torch

from hf_schedulefree.weights import only_data_loaded

pytest.importorskip("deepspeed", reason="needs DeepSpeed")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_is_refused_and_deepspeeds_own_classes_are_not(tmp_path):
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
