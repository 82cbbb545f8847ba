"""What the autoencoder promises, for one, two and three levels."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.code_noise import CodeNoise
from vqvae2.common.artifact import check_memory
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.threads import set_threads
from vqvae2.config import QuantizerConfig
from vqvae2.losses import make_loss
from vqvae2.nearest import nearest, neighbours
from vqvae2.quantizers import Quantized
from vqvae2.resnet import Attention, GroupNorm, Upsample

SMALL: dict[str, Any] = {
    "image": PreprocessingConfig(size=(32, 48), channels=2),
    "code_dims": (8,),
    "codebook_sizes": (16,),
    "hidden_channels": 16,
    "residual_channels": 8,
    "num_residual_blocks": 1,
}
LEVELS = [(4,), (2, 4), (2, 2, 4), (4, 2)]


def small_model(**options: Any) -> VQVAE2:
    """A small model, of two levels for images (2, 32, 48) if the options do not say otherwise."""
    torch.manual_seed(0)
    return VQVAE2(VQVAE2Config(**(SMALL | options)))


def some_images(number: int = 3) -> torch.Tensor:
    return torch.rand(number, 2, 32, 48) * 2 - 1


# The network


@pytest.mark.parametrize("network", ["paper", "resnet"])
@pytest.mark.parametrize("strides", LEVELS)
def test_decoding_the_codes_is_the_forward(strides: tuple[int, ...], network: str) -> None:
    model, images = small_model(strides=strides, network=network), some_images()
    model(images)  # starts the codebooks
    model.eval()
    with torch.no_grad():
        codes = [level.codes for level in model.encode(images)]
        assert [tuple(level.shape[1:]) for level in codes] == list(model.config.grids)
        expected = model(images).reconstruction
        assert torch.equal(model.decode_codes(codes), expected)


def test_compiling_catches_every_network_in_training_and_in_evaluation() -> None:
    """But for the last layer of the image decoder, which a discriminator's weight looks at."""
    model, graphs = small_model(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(sum("conv" in str(node.target) for node in graph.graph.nodes))
        return graph

    model.compile(backend=count)
    model.train()(some_images())
    with torch.no_grad():
        model.eval()(some_images())
    # Bottom and top encoder, level decoder, upsampler, image decoder.
    assert graphs == 2 * [5, 4, 4, 1, 4]


@pytest.mark.parametrize("strides", LEVELS)
@pytest.mark.parametrize("quantizer", ["ema", "gradient", "cosine", "fsq", "resnet"])
def test_every_parameter_receives_a_gradient(strides: tuple[int, ...], quantizer: str) -> None:
    if quantizer == "resnet":  # the other network
        model = small_model(strides=strides, network=quantizer)
    else:
        settings = QuantizerConfig(kind=quantizer, fsq_levels=(4, 3))  # type: ignore[arg-type]
        model = small_model(strides=strides, quantizer=settings)
    if quantizer == "fsq":  # a new network's features are rounded to zero: nothing would be learned
        for projection in model.projections:
            projection.weight.data *= 100
    loss_fn = make_loss("mse", model.config.codebook_size_per_level)
    loss, _ = loss_fn(model, {"images": some_images()})
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["ema", "gradient", "cosine", "fsq"])
def test_a_model_in_half_precision_encodes_and_decodes(kind: str) -> None:
    settings = QuantizerConfig(kind=kind, fsq_levels=(4, 3))  # type: ignore[arg-type]
    model, images = small_model(quantizer=settings), some_images()
    with torch.no_grad():
        model(images)  # starts the codebooks
        expected = model.eval()(images)
        for half in (torch.bfloat16, torch.float16):
            reconstruction, levels = model.to(half)(images)
            assert reconstruction.dtype == half
            assert torch.equal(reconstruction, model.decode_codes([x.codes for x in levels]))
            for level, other in zip(levels, expected.levels, strict=True):
                assert (level.codes == other.codes).float().mean() > 0.8
    wide = small_model(network="resnet", hidden_channels=128).to(torch.bfloat16).eval()
    assert wide(images).reconstruction.requires_grad


def test_layers_are_those_of_the_widely_used_implementation() -> None:
    """With codes of its dimension, on RGB images: weights of each convolution, from the table."""

    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel * kernel + outputs

    e, r, d = 128, 32, 64
    blocks = 2 * (conv(e, r, 3) + conv(r, e, 1))
    bottom_encoder = conv(3, e // 2, 4) + conv(e // 2, e, 4) + conv(e, e, 3) + blocks
    top_encoder = conv(e, e // 2, 4) + conv(e // 2, e, 3) + blocks
    projections = conv(e, d, 1) + conv(d + e, d, 1)
    top_decoder = conv(d, e, 3) + blocks + conv(e, d, 4)
    upsampler = conv(d, d, 4)
    image_decoder = conv(2 * d, e, 3) + blocks + conv(e, e // 2, 4) + conv(e // 2, 3, 4)
    encoding = bottom_encoder + top_encoder + projections + top_decoder
    expected = encoding + upsampler + image_decoder
    quantizer = QuantizerConfig(kind="ema")  # whose codebooks are no parameters
    model = VQVAE2(VQVAE2Config(code_dims=(d,), quantizer=quantizer))
    assert sum(p.numel() for p in model.parameters()) == expected == 1_388_867


def test_wrong_images_are_refused_with_both_numbers() -> None:
    model = small_model()
    with pytest.raises(UserError, match=r"30 x 48.* divisible by 8"):
        model(torch.zeros(1, 2, 30, 48))
    with pytest.raises(UserError, match=r"3 channels.* 2"):
        model(torch.zeros(1, 3, 32, 48))


# Level dropout


def test_level_dropout_leaves_out_finer_levels_for_its_share_of_the_images() -> None:
    model = small_model(strides=(2, 2, 4), level_dropout=0.4)
    embeddings = [torch.ones(500, 8, *grid) for grid in ((2, 3), (4, 6), (8, 12))]
    kept: list[list[torch.Tensor]] = [[], [], []]  # per level, of several forwards
    for number in torch.arange(4):
        for level, left in enumerate(model.drop_finer_levels(embeddings, number)):
            kept[level].append(left.amax(dim=(1, 2, 3)))
    top, middle, bottom = map(torch.cat, kept)
    assert (top == 1).all()
    assert (middle >= bottom).all()
    assert (1 - bottom).mean().item() == pytest.approx(0.4, abs=0.04)
    assert (1 - middle).mean().item() == pytest.approx(0.2, abs=0.04)
    assert not torch.equal(kept[2][0], kept[2][1])


def test_level_dropout_is_for_training_with_more_than_one_level() -> None:
    model, images = small_model(level_dropout=0.9), some_images()
    model(images)
    assert int(model.num_forwards) == 1
    model.eval()(images)
    assert int(model.num_forwards) == 1


# Code noise


def test_noise_replaces_codes_by_neighbours_in_its_share_of_the_images() -> None:
    """Of 80 codes two are near to each. How many codes of an image are replaced is random."""
    noisy = CodeNoise(small_model(codebook_sizes=(80,)), 0.4)
    codes = [torch.randint(80, (1000, 10, side)) for side in (4, 16)]
    levels = [Quantized(torch.empty(0), level, torch.zeros(())) for level in codes]
    noise, shares = noisy._noise(levels), []
    for quantizer, level, added in zip(noisy.autoencoder.quantizers, codes, noise, strict=True):
        codebook = quantizer.codebook
        embeddings = rearrange(quantizer.lookup(level) + added, "b d h w -> (b h w) d")
        ranks = torch.cdist(codebook, codebook).argsort(dim=1).argsort(dim=1)  # by distance
        chosen = ranks[level.flatten(), nearest(embeddings, codebook)].view_as(level)
        assert chosen.unique().tolist() == [0, 1, 2]
        shares.append((chosen > 0).float().mean(dim=(1, 2)))
    is_noisy = shares[1] > 0
    assert is_noisy.float().mean().item() == pytest.approx(0.4, abs=0.05)
    top, bottom = (share[is_noisy] for share in shares)
    assert bottom.mean().item() == pytest.approx(0.5, abs=0.05)
    assert bottom.std().item() == pytest.approx(12**-0.5, abs=0.05)  # as from 0 to 1
    assert torch.corrcoef(torch.stack([top, bottom]))[0, 1] > 0.8
    noisy.num_forwards += 1
    assert not torch.equal(noisy._noise(levels)[0], noise[0])

    # Codebooks that stay are searched once, and give the same.
    fixed = CodeNoise(noisy.autoencoder, 0.4, decoder_only=True)
    with mock.patch("vqvae2.code_noise.neighbours", wraps=neighbours) as search:
        for number in (0, 1, 0):
            fixed.num_forwards.fill_(number)
            again = fixed._noise(levels)
    assert search.call_count == 2
    assert all(map(torch.equal, again, noise))


@pytest.mark.parametrize("kind", ["ema", "gradient", "cosine", "fsq"])
def test_noise_reaches_the_image_decoder_alone(kind: str) -> None:
    """Codes, losses and codebooks are those without it; gradients pass straight through."""
    quantizer = QuantizerConfig(kind=kind, fsq_levels=(4, 5), estimator="rotation")  # type: ignore[arg-type]
    options: dict[str, Any] = {"quantizer": quantizer, "level_dropout": 0.0}
    plain, noisy = small_model(**options), CodeNoise(small_model(**options), 1.0)
    images = some_images()
    output, levels = noisy(images), plain.encode(images)
    for one, other in zip(output.levels, levels, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.loss, other.loss)
    for name, tensor in plain.quantizers.state_dict().items():
        assert torch.equal(tensor, noisy.autoencoder.quantizers.state_dict()[name]), name

    # By hand.
    noisy.num_forwards.zero_()
    embeddings = [level.embeddings for level in levels]
    noise = noisy._noise(levels)
    assert all(each.any() for each in noise)
    both = zip(embeddings, noise, strict=True)
    read = [(e + added).detach().requires_grad_() for e, added in both]
    expected = plain.decode(read)
    assert torch.equal(output.reconstruction, expected)
    output.reconstruction.square().sum().backward()
    expected.square().sum().backward()
    torch.autograd.backward(embeddings, [each.grad for each in read])
    weights = dict(noisy.autoencoder.named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weights[name].grad, weight.grad, msg=name)
    noisy.eval()
    assert torch.equal(noisy(images).reconstruction, noisy.autoencoder(images).reconstruction)


# The model as a folder


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model, images = small_model(), some_images()
    model(images)
    model.eval().save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors"]
    again = VQVAE2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.content_hash() == model.content_hash()
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


def test_loading_is_strict(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    weights_file = tmp_path / "model.safetensors"
    weights, config = load_file(weights_file), read_json(tmp_path / "config.json")
    name = next(iter(weights))
    others = {key: tensor for key, tensor in weights.items() if key != name}

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            VQVAE2.from_pretrained(tmp_path)

    write_json(tmp_path / "config.json", {**config, "colour": 1})
    refused(r"config.json: unknown key 'colour'")
    write_json(tmp_path / "config.json", {**config, "architecture": "TransformerPrior"})
    refused(r"'TransformerPrior'.*'VQVAE2'")
    write_json(tmp_path / "config.json", config)
    save_file(others, weights_file)
    refused(f"lacks the weight '{name}'")
    save_file({**weights, "extra": torch.zeros(1)}, weights_file)
    refused("unknown weight 'extra'")
    save_file({**weights, name: torch.zeros(1)}, weights_file)
    refused(r"has shape \(1,\)")
    weights_file.write_bytes(b"no" * 50_000)
    refused("cannot be read as safetensors")


def test_a_path_never_goes_to_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(*args: object, **options: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    absolute = str(tmp_path / "none")
    for name in ("runs/vqvae", "runs/x/vqvae", "./some/thing", "/absolute", "name", absolute):
        with pytest.raises(UserError, match="is not a folder"):
            VQVAE2.from_pretrained(name)


def test_the_hub_is_asked_for_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)

    def download(name: str, **options: object) -> str:
        if name != "someone/model":
            raise ConnectionError
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert isinstance(VQVAE2.from_pretrained("someone/model"), VQVAE2)
    with pytest.raises(UserError, match="someone/else is neither a local folder nor a repository"):
        VQVAE2.from_pretrained("someone/else")


def test_a_model_is_uploaded_as_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **options: object) -> Any:
            sent["created"] = {"repo_id": repo_id, **options}
            return mock.Mock(repo_id=f"someone/{repo_id}")

        def upload_folder(self, folder_path: str, **options: object) -> str:
            sent["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            sent["model"] = VQVAE2.from_pretrained(folder_path)
            return f"https://hub/{options['repo_id']}/{options['revision']}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = small_model()
    url = model.push_to_hub("faces", private=True, token="secret", branch="v2")
    assert url == "https://hub/someone/faces/v2"
    assert sent["created"] == {"repo_id": "faces", "private": True, "exist_ok": True}
    assert (sent["token"], sent["files"]) == ("secret", ["config.json", "model.safetensors"])
    assert sent["model"].content_hash() == model.content_hash()


def test_the_hash_is_of_what_decides_the_codes() -> None:
    model = small_model()
    before = model.content_hash()
    with torch.no_grad():
        model.image_decoder[0].weight.add_(1)
    assert model.content_hash() == before
    with torch.no_grad():
        model.quantizers[0].codebook[0].add_(1)
    assert model.content_hash() != before


def test_the_hash_does_not_change_between_versions() -> None:
    """Code datasets are bound to it: a configuration's keys are part of every hash."""
    model = small_model(quantizer=QuantizerConfig(kind="fsq", fsq_levels=(4, 3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.content_hash().startswith("ce6f3a1939a7")


def test_a_network_too_large_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stranger's folder by its weights, of one's own training by the machine's memory."""
    VQVAE2(VQVAE2Config(hidden_channels=16, code_dims=(8,))).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "hidden_channels": 1 << 16})
    with pytest.raises(UserError, match=r"config\.json asks for .*: the weights belong to another"):
        VQVAE2.from_pretrained(tmp_path)
    monkeypatch.setattr("vqvae2.common.artifact.machine_memory", lambda: 1 << 30)
    giant = VQVAE2Config(hidden_channels=1 << 16)
    with pytest.raises(UserError, match=r"the network has .* GiB of weights, but this machine has"):
        check_memory(lambda: VQVAE2(giant))


# The residual network


def test_repeated_pixels_are_convolved_as_if_they_were_there() -> None:
    layer, features = Upsample(6), torch.randn(2, 6, 5, 7)
    repeated = F.interpolate(features, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(repeated, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(features), expected, atol=1e-5, rtol=0)


def test_attention_is_on_the_top_grid_alone() -> None:
    """In the top's encoder and decoder: after each block, and in the middle."""
    model = small_model(network="resnet", strides=(2, 2, 4), num_residual_blocks=2)
    places = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    assert {".".join(name.split(".")[:2]) for name in places} == {"encoders.0", "level_decoders.0"}
    assert len(places) == 2 + 1 + 3 + 1


def test_widths_follow_the_multipliers_from_the_top_grid_to_the_image() -> None:
    assert VQVAE2Config(network="resnet").widths == (128, 128, 64, 32)
    config = VQVAE2Config(network="resnet", width_multipliers=(2, 1, 0.5, 0.25))
    model = VQVAE2(config)
    assert model.encoders[1][0].weight.shape[0] == 32
    assert model.encoders[0][-1].weight.shape[:2] == (128, 256)
    with pytest.raises(UserError, match="must be 4 numbers"):
        VQVAE2Config(network="resnet", width_multipliers=(1, 1))
    with pytest.raises(UserError, match="with the network resnet"):
        VQVAE2Config(width_multipliers=(1, 1, 1, 1))


def test_a_model_of_the_paper_is_written_as_before_there_were_others(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    assert not {"network", "width_multipliers"} & read_json(tmp_path / "config.json").keys()
    small_model(network="resnet").save_pretrained(tmp_path)
    assert VQVAE2.from_pretrained(tmp_path).config.network == "resnet"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 128])
def test_a_group_norm_is_computed_alike_in_each_way(channels: int, kind: torch.dtype) -> None:
    """Which is the fastest depends on the channels, the precision, and on gradients."""
    norm, plain = GroupNorm(channels), nn.GroupNorm(32, channels, eps=1e-6)
    plain.weight.data = norm.weight.data = torch.rand(channels) + 0.5
    features = torch.randn(3, channels, 5, 4).contiguous(memory_format=torch.channels_last)
    pull, found = torch.randn(3, channels, 5, 4), []
    for layer, own in ((norm, kind), (plain, torch.float32)):
        given = features.to(own).requires_grad_()
        with torch.autocast("cpu", enabled=kind is torch.bfloat16):
            result = layer(given)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.dtype == own
        result.backward(pull.to(own))
        assert given.grad is not None
        found.append((result.float(), given.grad.float(), layer.weight.grad))
    tolerance = {} if kind is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(norm(features), found[1][0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_features_have_the_same_bits_wherever_an_image_is_in_the_batch(threads: int) -> None:
    """On a CPU threads share the pixels of a batch: a norm's sums might be cut inside an image."""
    model = small_model(network="resnet")
    images = some_images(32).contiguous(memory_format=torch.channels_last)

    def features(images: torch.Tensor) -> torch.Tensor:
        return model.encoders[0](model.encoders[1](images))

    set_threads(threads)
    try:
        with torch.no_grad():
            assert torch.equal(features(images.roll(5, dims=0)).roll(-5, dims=0), features(images))
    finally:
        set_threads(0)
