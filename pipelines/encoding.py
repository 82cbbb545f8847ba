"""Images to the codes that a dataset of them holds: always as many at once, for the same bits."""

import torch
from einops import rearrange
from torch import Tensor

from vqvae2.common.errors import UserError
from vqvae2.common.torch_settings import exact_convolutions
from vqvae2.data import to_images
from vqvae2.model import VQVAE2

LANES = 32  # images encoded at once, always: a convolution's last bits depend on the batch size


@torch.inference_mode()
@exact_convolutions()
def encode_lanes(model: VQVAE2, pixels: Tensor, *, bf16: bool = False) -> list[Tensor]:
    """Codes `(B, h*w)` of every level, coarse to fine, of at most `LANES` images `(B, C, H, W)`.

    The batch is filled up with black images, so that an image's codes do not depend on the others.
    Raises a `UserError` for features that are not finite.
    """
    padding = pixels.new_zeros(LANES - len(pixels), *pixels.shape[1:])
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        levels = model.encode(to_images(torch.cat([pixels, padding]).to(model.device)))
    ends = [torch.stack(level.embeddings.aminmax()) for level in levels]  # a NaN is both
    if not all(end.isfinite().all() for end in ends):
        what = "the autoencoder's features are not finite"
        raise UserError(f"{what}: restore or retrain it, or extract with --mixed-precision no.")
    return [rearrange(level.codes[: len(pixels)], "b h w -> b (h w)").cpu() for level in levels]
