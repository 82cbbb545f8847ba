"""Stage-1 checkpoints of other implementations as models.

Their layers are ours, so only names change. All sizes follow from the shapes; the image size is not
in such a file.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.importers import rosinality_weights, vqgan_weights
from vqvae2.common.errors import UserError
from vqvae2.model import VQVAE2

IMPORTERS: dict[str, Any] = {  # by how some name in such a file begins
    "enc_b.": rosinality_weights,
    "encoder.conv_blocks.": vqgan_weights,
    "encoder.down.": vqgan_weights,
}
ADVICE = (
    "give a stage-1 file of rosinality/vq-vae-2-pytorch (vqvae_*.pt), or a VQGAN tokenizer of"
    " LlamaGen (vq_ds16_c2i.pt) or taming-transformers (last.ckpt)"
)
WHERE = ("ema", "model", "state_dict")  # keys under which files hold their weights, the best first
UNUSED = ("loss.", "quantize.codebook_used")  # a discriminator, and figures
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def import_weights(checkpoint: Path, size: tuple[int, ...]) -> VQVAE2:
    """The model in a checkpoint (also one of several GPUs, with `module.` before each name), which
    was trained on images of this size. Raises a `UserError` if it is no such checkpoint."""
    # Whose it is, and a model of the sizes that the shapes imply.
    theirs = _read(checkpoint)
    signs = [sign for sign in IMPORTERS if any(name.startswith(sign) for name in theirs)]
    if not signs:
        raise UserError(f"{checkpoint} holds none of the layers that are known: {ADVICE}.")
    importer = IMPORTERS[signs[0]]
    try:
        model = VQVAE2(importer.read_config(theirs, size))
    except KeyError as error:
        raise UserError(f"{checkpoint} lacks {error}: {ADVICE}.") from None
    except UserError:  # of settings that are given, such as the size
        raise
    except (IndexError, ValueError, ArithmeticError):
        fault = f"{checkpoint} has layers of other shapes than such a file"
        raise UserError(f"{fault}: {ADVICE}.") from None
    expected, ours = model.state_dict(), {}
    for name, tensor in expected.items():
        if name.endswith(("num_updates", "num_forwards")):
            ours[name] = torch.ones_like(tensor)  # the codebooks are in use

    # Every tensor under our name.
    for name, our_name, tensor in importer.rename(theirs, model.config):
        if our_name not in expected:
            raise UserError(f"{checkpoint} holds {name!r}, which is unknown: {ADVICE}.")
        ours[our_name] = tensor
        shape, needed = tuple(tensor.shape), tuple(expected[our_name].shape)
        if shape != needed:
            fault = f"{name!r} has shape {shape}, but the other layers need {needed}"
            raise UserError(f"{checkpoint}: {fault}: {ADVICE}.")
    for name in sorted(expected.keys() - ours.keys()):
        raise UserError(f"{checkpoint} lacks what we call {name!r}: give a whole checkpoint.")
    model.load_state_dict(ours)
    return model.eval()


def _read(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint, none of whose code is run; all of them finite numbers."""
    # What the file holds.
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist, or is no file: check the path.")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, as the bytes may be anything
        fault = f"{checkpoint} cannot be read as a checkpoint of plain tensors"
        if "can still be loaded" not in str(error):  # torch's words for one with other objects
            reason = str(error).split("\n", maxsplit=1)[0].split(". ")[0] or type(error).__name__
            raise UserError(
                f"{fault} ({reason}): it is damaged, or no checkpoint: copy it again."
            ) from None
        safe = "if it holds more and you trust it, save the weights alone, in Python: torch.save("
        safe += "torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        raise UserError(f"{fault}: {ADVICE}; {safe}.") from None
    inner = [state[key] for key in WHERE if isinstance(state, dict) and key in state]
    state = inner[0] if inner else state
    pairs = state.items() if isinstance(state, dict) else ()
    if not pairs or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs):
        raise UserError(f"{checkpoint} is not a state dict of tensors: {ADVICE}.")
    named = {name.removeprefix("module."): tensor for name, tensor in pairs}
    state = {name: tensor for name, tensor in named.items() if not name.startswith(UNUSED)}

    # What each tensor is. A few bytes, repeated, could claim any shape.
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and not tensor.is_meta
        if not plain or tensor.dtype not in DTYPES:
            seen = f"{name!r} is a tensor of {tensor.layout}, {tensor.dtype} on {tensor.device}"
            raise UserError(f"{checkpoint}: {seen}, but must hold plain floats: {ADVICE}.")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{checkpoint}: {name!r} holds less than its shape says: {ADVICE}.")
        if not tensor.float().isfinite().all():
            raise UserError(f"{checkpoint}: {name!r} holds NaN or infinity: give sound weights.")
    return state
