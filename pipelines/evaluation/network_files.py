"""Networks of other programs, from files that say all there is to say: TorchScript and ONNX."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqvae2.common.errors import UserError


def load_network(path: str | Path) -> nn.Module:
    """The network in a file: ONNX if its name ends in .onnx, else TorchScript.

    Raises:
        UserError: the file cannot be read, or onnxruntime is not installed.
    """
    if Path(path).suffix == ".onnx":
        return OnnxNetwork(path)
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        what = f"{path} cannot be read as TorchScript ({reason})"
        raise UserError(f"{what}: save it with torch.jit.save.") from None


class OnnxNetwork(nn.Module):
    """A network as `torch.onnx.export` writes it, of one input, run by onnxruntime on the CPU."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path} needs onnxruntime: pip install 'vqvae2[onnx]'.") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        try:
            self.session: Any = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # each fault of a file has its own class
            reason = " ".join(str(error).split())[:200]
            what = f"{path} cannot be read as ONNX ({reason})"
            raise UserError(f"{what}: write it with torch.onnx.export.") from None

    def forward(self, images: Tensor) -> Tensor:
        """The first output for images. Raises a `RuntimeError` if they are not what it takes."""
        first = self.session.get_inputs()[0].name
        try:
            outputs = self.session.run(None, {first: images.cpu().numpy()})
            return torch.from_numpy(outputs[0]).to(images.device)
        except Exception as error:  # as above
            raise RuntimeError(" ".join(str(error).split())) from None
