"""Stage-1 checkpoints of rosinality/vq-vae-2-pytorch, the widely used implementation, as models of ours.

Both share the layers, so only names change; the number of residual blocks, the widths, D and K are read off the shapes. The image size is
not in such a file.
"""

import pickle
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
CODEBOOK = {"embed": "codebook", "cluster_size": "counts", "embed_avg": "sums"}


def import_weights(checkpoint: Path, size: tuple[int, ...]) -> VQVAE2:
    """The model in a checkpoint (also one saved from several GPUs, with `module.` before each name).

    Args:
        size: height and width of the images that it was trained on, or one number for both.

    Raises:
        UserError: the file is no such checkpoint, or has parts that are not known.
    """
    theirs = {name.removeprefix("module."): tensor for name, tensor in _read(checkpoint).items()}
    config = _read_config(checkpoint, theirs, size)
    model = VQVAE2(config)
    expected = model.state_dict()
    ours = {
        name: torch.ones_like(tensor)
        for name, tensor in expected.items()
        if name.endswith(("num_updates", "num_forwards"))
    }  # the codebooks have begun
    for name, tensor in theirs.items():
        our_name = _rename(name)
        if our_name not in expected:
            raise UserError(
                f"{checkpoint} holds {name!r}, which no model of rosinality/vq-vae-2-pytorch with these layers has: it is not imported."
            )
        if our_name.endswith((".codebook", ".sums")):
            tensor = tensor.T  # theirs are (D, K)  # noqa: PLW2901
        if tensor.shape != expected[our_name].shape:
            raise UserError(
                f"{checkpoint}: {name!r} has shape {tuple(tensor.shape)}, but {tuple(expected[our_name].shape)} fits the other layers."
            )
        ours[our_name] = tensor
    for name in sorted(expected.keys() - ours.keys()):
        raise UserError(
            f"{checkpoint} lacks what we call {name!r}: it is no whole stage-1 checkpoint."
        )
    model.load_state_dict(ours)
    return model.eval()


def _read(checkpoint: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{checkpoint} does not exist: check the path.") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{checkpoint} cannot be read as a checkpoint of plain tensors ({reason}): give the .pt file of stage 1."
        ) from None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise UserError(
            f"{checkpoint} is not a state dict of tensors: give the .pt file of stage 1 (vqvae_*.pt), not of a prior."
        )
    return state


def _read_config(checkpoint: Path, state: dict[str, Tensor], size: tuple[int, ...]) -> VQVAE2Config:
    """The configuration that the shapes tell."""
    try:
        kernel = state["enc_b.blocks.4.weight"].shape[-1]
        strided = 2 if kernel == 3 else 0
        hidden, channels = (
            state["enc_b.blocks.4.weight"].shape[0],
            state["enc_b.blocks.0.weight"].shape[1],
        )
        embeds = [state["quantize_t.embed"], state["quantize_b.embed"]]
        blocks = [
            name for name in state if re.fullmatch(r"enc_b\.blocks\.\d+\.conv\.1\.weight", name)
        ]
        residual = state[blocks[0]].shape[0] if blocks else 1
    except KeyError as error:
        raise UserError(
            f"{checkpoint} lacks {error}: it is no stage-1 checkpoint of rosinality/vq-vae-2-pytorch."
        ) from None
    if not strided:
        raise UserError(
            f"{checkpoint} has a bottom encoder that is not of stride 4: only that is known."
        )
    return VQVAE2Config(
        image=PreprocessingConfig(
            size=size, channels=channels
        ),  # resized and cut in the centre, scaled to [-1, 1]: as theirs
        strides=(2, 4),
        codebook_sizes=tuple(embed.shape[1] for embed in embeds),
        code_dims=tuple(embed.shape[0] for embed in embeds),
        hidden_channels=hidden,
        residual_channels=residual,
        num_residual_blocks=len(blocks),
        level_dropout=0.0,
    )


def _rename(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if prefix is None:
        return name
    rest = name.removeprefix(prefix).replace(".conv.", ".")
    return PREFIXES[prefix] + CODEBOOK.get(rest, rest)
