"""Names and sizes in tokenizers of taming-transformers (VQGAN) and LlamaGen: models of one level
with the network `resnet`. Taming's names are first turned into LlamaGen's."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvae2.config import PreprocessingConfig, QuantizerConfig, VQVAE2Config

CODEBOOK = "quantize.embedding.weight"
MIDDLE = ("block_1", "attn_1", "block_2")
BATCH = 32  # images of the batches in which the codes are taken to be used equally often


def read_config(state: Mapping[str, Tensor], size: tuple[int, ...]) -> VQVAE2Config:
    """The configuration that the shapes imply. Raises a KeyError (a missing name), IndexError or
    ValueError (other shapes)."""
    # Layers.
    known = _as_llamagen(state)
    hidden, channels = known["encoder.conv_out.weight"].shape[0], _inputs(known, "encoder.conv_in")
    number, blocks = _count(known, r"()(\d+)\..*"), _count(known, r"(0\.res\.)(\d+)\..*")
    widths = []
    for i in reversed(range(number)):
        widths.append(known[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0])

    # LlamaGen compares codes by cosine; taming's learned by gradient descent.
    codebook_size, dim = known[CODEBOOK].shape
    kind = "cosine" if "encoder.conv_blocks.0.res.0.conv1.weight" in state else "gradient"
    return VQVAE2Config(
        image=PreprocessingConfig(size=size, channels=channels),
        strides=(2 ** (number - 1),),
        codebook_sizes=(codebook_size,),
        code_dims=(dim,),
        network="resnet",
        hidden_channels=hidden,
        width_multipliers=tuple(width / hidden for width in widths),
        num_residual_blocks=blocks,
        level_dropout=0.0,
        quantizer=QuantizerConfig(kind=kind),  # type: ignore[arg-type]
    )


def rename(state: Mapping[str, Tensor], config: VQVAE2Config) -> Iterator[tuple[str, str, Tensor]]:
    """Their name, our name and the tensor, and what we keep beside the codebook."""
    # Every layer.
    places = _places(len(config.widths), config.num_residual_blocks)
    for name, known in zip(state, _as_llamagen(state), strict=True):
        layer, _, parameter = known.rpartition(".")
        inner = re.fullmatch(r"(.*)\.(norm\d?|conv[12]|nin_shortcut|[qkv]|proj_out)", layer)
        our_name = known
        if layer in places:
            our_name = f"{places[layer]}.{parameter}"
        elif inner and inner[1] in places:
            sublayer = inner[2].replace("nin_shortcut", "shortcut")
            our_name = f"{places[inner[1]]}.{sublayer}.{parameter}"
        if known != CODEBOOK:
            yield name, our_name, state[name]

    # The codebook, and averages as if its codes had been used equally often.
    codebook, (height, width) = state[CODEBOOK].float(), config.grids[0]
    is_cosine = config.quantizer.kind == "cosine"
    codebook = F.normalize(codebook, dim=1) if is_cosine else codebook
    counts = torch.full((len(codebook),), BATCH * height * width / len(codebook))
    yield CODEBOOK, "quantizers.0.codebook", codebook
    yield CODEBOOK, "quantizers.0.counts", counts
    if is_cosine:
        yield CODEBOOK, "quantizers.0.sums", counts[:, None] * codebook


def _as_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Taming's names as LlamaGen's, in the same order: its decoder counts from the image."""
    ups = [int(name.split(".")[2]) for name in state if name.startswith("decoder.up.")]
    renamed = {}
    for name, tensor in state.items():
        known = name
        for place, layer in enumerate(MIDDLE):
            known = known.replace(f"coder.mid.{layer}.", f"coder.mid.{place}.")
        known = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", known)
        if match := re.match(r"decoder\.up\.(\d+)\.", known):
            known = f"decoder.conv_blocks.{max(ups) - int(match[1])}.{known[match.end() :]}"
        renamed[re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", known)] = tensor
    return renamed


def _places(number: int, blocks: int) -> dict[str, str]:
    """Where each of LlamaGen's layers is in ours, for so many resolutions and blocks on each."""
    # In the order of the computation.
    encoder, decoder = ["encoder.conv_in"], ["post_quant_conv", "decoder.conv_in"]
    middle = [f"decoder.mid.{layer}" for layer in range(3)]
    decoder += middle
    for i in range(number):
        encoder += _stage(f"encoder.conv_blocks.{i}", blocks, i == number - 1)
        decoder += _stage(f"decoder.conv_blocks.{i}", blocks + 1, i == 0)
        if i < number - 1:
            encoder.append(f"encoder.conv_blocks.{i}.downsample.conv")
            decoder.append(f"decoder.conv_blocks.{i}.upsample.conv")
    encoder += [name.replace("decoder", "encoder") for name in middle]
    encoder += ["encoder.norm_out", "SiLU", "encoder.conv_out"]
    decoder += ["decoder.norm_out", "SiLU", "decoder.conv_out"]

    # Ours are numbered.
    places = {"quant_conv": "projections.0"}
    for ours, layers in (("encoders.0", encoder), ("image_decoder", decoder)):
        places |= {layer: f"{ours}.{index}" for index, layer in enumerate(layers)}
    return places


def _stage(start: str, blocks: int, attention: bool) -> list[str]:
    layers = []
    for block in range(blocks):
        layers += [f"{start}.res.{block}", f"{start}.attn.{block}"][: 1 + attention]
    return layers


def _count(state: Mapping[str, Tensor], rest: str) -> int:
    """How many different numbers follow `encoder.conv_blocks.`, by a pattern's second group."""
    found = (re.fullmatch(rf"encoder\.conv_blocks\.{rest}", name) for name in state)
    return len({match[2] for match in found if match})


def _inputs(state: Mapping[str, Tensor], layer: str) -> int:
    _, inputs, _, _ = state[f"{layer}.weight"].shape
    return inputs
