"""Stage-1 checkpoints of rosinality/vq-vae-2-pytorch, the widely used implementation, as models.

Both share the layers, so only names change. The number of residual blocks, the widths, D and K
follow from the shapes; the image size is not in such a file.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from vqvae2.common.errors import UserError
from vqvae2.config import PreprocessingConfig, VQVAE2Config
from vqvae2.model import VQVAE2

PREFIXES = {  # theirs -> ours; level 0 is the top
    "enc_t.blocks.": "encoders.0.",
    "enc_b.blocks.": "encoders.1.",
    "quantize_conv_t.": "projections.0.",
    "quantize_conv_b.": "projections.1.",
    "quantize_t.": "quantizers.0.",
    "quantize_b.": "quantizers.1.",
    "dec_t.blocks.": "level_decoders.0.",
    "upsample_t.": "upsamplers.0.0.",
    "dec.blocks.": "image_decoder.",
}
ADVICE = "give a stage-1 file (vqvae_*.pt) of rosinality/vq-vae-2-pytorch"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CODEBOOK = {"embed": "codebook", "cluster_size": "counts", "embed_avg": "sums"}


def import_weights(checkpoint: Path, size: tuple[int, ...]) -> VQVAE2:
    """The model in a checkpoint (also one of several GPUs, with `module.` before each name), which
    was trained on images of this size. Raises a `UserError` if it is no such checkpoint."""
    # A model of the sizes that the shapes imply.
    theirs = {name.removeprefix("module."): tensor for name, tensor in _read(checkpoint).items()}
    model = VQVAE2(_read_config(checkpoint, theirs, size))
    expected, ours = model.state_dict(), {}
    for name, tensor in expected.items():
        if name.endswith(("num_updates", "num_forwards")):
            ours[name] = torch.ones_like(tensor)  # the codebooks are in use

    # Every tensor under our name; their codebooks are (D, K).
    for name, tensor in theirs.items():
        our_name = _rename(name)
        if our_name not in expected:
            raise UserError(f"{checkpoint} holds {name!r}, which is unknown: {ADVICE}.")
        ours[our_name] = tensor.T if our_name.endswith((".codebook", ".sums")) else tensor
        shape, needed = tuple(ours[our_name].shape), tuple(expected[our_name].shape)
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
        reason = str(error).split("\n", maxsplit=1)[0][:200] or type(error).__name__
        fault = f"{checkpoint} cannot be read as a checkpoint of plain tensors ({reason})"
        safe = "if it holds more and you trust it, save its state_dict() alone with torch.save"
        raise UserError(f"{fault}: {ADVICE}; {safe}.") from None
    pairs = state.items() if isinstance(state, dict) else ()
    if not pairs or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs):
        raise UserError(f"{checkpoint} is not a state dict of tensors: {ADVICE}.")

    # What each tensor is. A few bytes, repeated, could claim any shape.
    for name, tensor in pairs:
        plain = tensor.layout is torch.strided and not tensor.is_meta
        if not plain or tensor.dtype not in DTYPES:
            seen = f"{name!r} is a tensor of {tensor.layout}, {tensor.dtype} on {tensor.device}"
            raise UserError(f"{checkpoint}: {seen}, but must hold plain floats: {ADVICE}.")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(f"{checkpoint}: {name!r} holds less than its shape says: {ADVICE}.")
        if not tensor.float().isfinite().all():
            raise UserError(f"{checkpoint}: {name!r} holds NaN or infinity: give sound weights.")
    return state


def _read_config(checkpoint: Path, state: dict[str, Tensor], size: tuple[int, ...]) -> VQVAE2Config:
    """The configuration that the shapes imply."""
    try:
        first, third = state["enc_b.blocks.0.weight"], state["enc_b.blocks.4.weight"]
        embeds = [state["quantize_t.embed"], state["quantize_b.embed"]]
    except KeyError as error:
        raise UserError(f"{checkpoint} lacks {error}: {ADVICE}.") from None
    for tensor, rank in zip([first, third, *embeds], (4, 4, 2, 2), strict=True):
        if tensor.ndim != rank:
            seen = f"a layer of shape {tuple(tensor.shape)} where {rank} dimensions belong"
            raise UserError(f"{checkpoint} has {seen}: {ADVICE}.")
    if third.shape[-1] != 3:  # with another stride, block 4 is a strided convolution
        raise UserError(f"{checkpoint} has a bottom encoder of another stride than 4: {ADVICE}.")
    inner = r"enc_b\.blocks\..*\.conv\.1\.weight"
    residual = [t for name, t in state.items() if re.fullmatch(inner, name) and t.ndim]
    return VQVAE2Config(
        # As theirs: resized, cut in the centre, scaled to [-1, 1].
        image=PreprocessingConfig(size=size, channels=first.shape[1]),
        strides=(2, 4),
        codebook_sizes=tuple(embed.shape[1] for embed in embeds),
        code_dims=tuple(embed.shape[0] for embed in embeds),
        hidden_channels=third.shape[0],
        residual_channels=residual[0].shape[0] if residual else 1,
        num_residual_blocks=len(residual),
        level_dropout=0.0,
    )


def _rename(name: str) -> str:
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            layer = name.removeprefix(theirs).replace(".conv.", ".")
            return ours + CODEBOOK.get(layer, layer)
    return name
