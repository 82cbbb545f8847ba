"""Names and sizes in a stage-1 checkpoint of rosinality/vq-vae-2-pytorch, the widely used
implementation of the paper's network."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from vqvae2.config import PreprocessingConfig, QuantizerConfig, VQVAE2Config

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


def read_config(state: Mapping[str, Tensor], size: tuple[int, ...]) -> VQVAE2Config:
    """The configuration that the shapes imply. Raises a KeyError (a missing name), IndexError or
    ValueError (other shapes)."""
    _, channels, _, _ = state["enc_b.blocks.0.weight"].shape
    hidden, _, _, kernel = state["enc_b.blocks.4.weight"].shape
    if kernel != 3:  # with another stride than 4, block 4 is a strided convolution
        raise ValueError
    dims, sizes = zip(*(state[f"quantize_{level}.embed"].shape for level in "tb"), strict=True)
    inner = r"enc_b\.blocks\..*\.conv\.1\.weight"
    residual = [t for name, t in state.items() if re.fullmatch(inner, name)]
    return VQVAE2Config(
        # As theirs: resized, cut in the centre, scaled to [-1, 1].
        image=PreprocessingConfig(size=size, channels=channels),
        strides=(2, 4),
        codebook_sizes=sizes,
        code_dims=dims,
        hidden_channels=hidden,
        residual_channels=residual[0].shape[0] if residual else 1,
        num_residual_blocks=len(residual),
        level_dropout=0.0,
        quantizer=QuantizerConfig(kind="ema"),
    )


def rename(state: Mapping[str, Tensor], config: VQVAE2Config) -> Iterator[tuple[str, str, Tensor]]:
    """Their name, our name and the tensor; their codebooks are (D, K)."""
    for name, tensor in state.items():
        our_name = name
        for theirs, ours in PREFIXES.items():
            if name.startswith(theirs):
                layer = name.removeprefix(theirs).replace(".conv.", ".")
                our_name = ours + CODEBOOK.get(layer, layer)
        is_codebook = our_name.endswith((".codebook", ".sums"))
        yield name, our_name, tensor.T if is_codebook else tensor
