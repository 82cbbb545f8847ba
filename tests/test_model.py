"""What the autoencoder promises, for one, two and three levels."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.config import QuantizerConfig
from vqvae2.losses import make_loss

SMALL = {
    "code_dims": (8,),
    "codebook_sizes": (16,),
    "hidden_channels": 16,
    "residual_channels": 8,
    "num_residual_blocks": 1,
}
LEVELS = [(4,), (2, 4), (2, 2, 4), (4, 2)]


def small(strides: tuple[int, ...], **options) -> VQVAE2:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    image = options.pop("image", PreprocessingConfig(size=(32, 48), channels=2))
    return VQVAE2(VQVAE2Config(image=image, strides=strides, **(SMALL | options)))


@pytest.mark.parametrize("strides", LEVELS)
def test_decoding_the_codes_is_the_forward(strides: tuple[int, ...]) -> None:
    model = small(strides)
    images = torch.rand(3, 2, 32, 48) * 2 - 1
    model(images)  # starts the codebooks
    model.eval()
    with torch.no_grad():
        codes = [level.codes for level in model.encode(images)]
        assert [tuple(c.shape[1:]) for c in codes] == list(model.config.grids)
        torch.testing.assert_close(
            model.decode_codes(codes), model(images).reconstruction, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("strides", LEVELS)
@pytest.mark.parametrize("quantizer", ["ema", "gradient", "cosine", "fsq"])
def test_every_parameter_receives_a_gradient(strides: tuple[int, ...], quantizer: str) -> None:
    model = small(strides, quantizer=QuantizerConfig(kind=quantizer, fsq_levels=(4, 3)))
    if (
        quantizer == "fsq"
    ):  # features of a new network are all rounded to zero, and then the decoder's weights multiply nothing
        for projection in model.projections:
            projection.weight.data *= 100
    loss, _ = make_loss("mse", model.config.codebook_size_per_level)(
        model, {"images": torch.rand(3, 2, 32, 48) * 2 - 1}
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_layers_are_those_of_the_widely_used_implementation() -> None:
    """The default network on RGB images: counts of each convolution's weights, written out from the table of layers."""
    conv = lambda i, o, k: i * o * k * k + o  # noqa: E731
    e, r, d = 128, 32, 64
    blocks = 2 * (conv(e, r, 3) + conv(r, e, 1))
    bottom_encoder = conv(3, e // 2, 4) + conv(e // 2, e, 4) + conv(e, e, 3) + blocks
    top_encoder = conv(e, e // 2, 4) + conv(e // 2, e, 3) + blocks
    quantizers = conv(e, d, 1) + conv(d + e, d, 1)
    top_decoder = conv(d, e, 3) + blocks + conv(e, d, 4)
    image_decoder = conv(2 * d, e, 3) + blocks + conv(e, e // 2, 4) + conv(e // 2, 3, 4)
    expected = (
        bottom_encoder + top_encoder + quantizers + top_decoder + conv(d, d, 4) + image_decoder
    )
    assert sum(p.numel() for p in VQVAE2(VQVAE2Config()).parameters()) == expected == 1_388_867


def test_wrong_images_are_refused_with_both_numbers() -> None:
    model = small((2, 4))
    with pytest.raises(UserError, match=r"30 x 48.*divisible by 8"):
        model(torch.zeros(1, 2, 30, 48))
    with pytest.raises(UserError, match=r"3 channels.* 2"):
        model(torch.zeros(1, 3, 32, 48))


def test_save_and_load(tmp_path: Path) -> None:
    model = small((2, 4))
    model(torch.rand(2, 2, 32, 48))
    model.eval().save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = VQVAE2.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert again.content_hash() == model.content_hash()
    images = torch.rand(2, 2, 32, 48)
    assert torch.equal(again(images).reconstruction, model(images).reconstruction)


def test_loading_is_strict(tmp_path: Path) -> None:
    small((2, 4)).save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), read_json(tmp_path / "config.json")

    write_json(tmp_path / "config.json", {**config, "colour": 1})
    with pytest.raises(UserError, match=r"config.json: unknown key 'colour'"):
        VQVAE2.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {**config, "architecture": "TransformerPrior"})
    with pytest.raises(UserError, match=r"'TransformerPrior'.*'VQVAE2'"):
        VQVAE2.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", config)

    name = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks the weight '{name}'"):
        VQVAE2.from_pretrained(tmp_path)
    save_file({**weights, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unknown weight 'extra'"):
        VQVAE2.from_pretrained(tmp_path)
    save_file({**weights, name: torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has shape \(1,\)"):
        VQVAE2.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        VQVAE2.from_pretrained(tmp_path)


def test_a_path_never_goes_to_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "vqvae2.common.artifact.snapshot_download", lambda *a, **k: pytest.fail("asked the network")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (
        "runs/vqvae",
        "runs/x/vqvae",
        "./some/thing",
        "/absolute",
        "name",
        str(tmp_path / "none"),
    ):
        with pytest.raises(UserError, match="is not a folder"):
            VQVAE2.from_pretrained(name)


def test_the_hub_is_asked_for_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small((2, 4)).save_pretrained(tmp_path / "cache")
    monkeypatch.setattr(
        "vqvae2.common.artifact.snapshot_download",
        lambda name, **k: str(tmp_path / "cache") if name == "someone/model" else 1 / 0,
    )
    assert isinstance(VQVAE2.from_pretrained("someone/model"), VQVAE2)
    with pytest.raises(UserError, match="someone/else is neither a local folder nor a repository"):
        VQVAE2.from_pretrained("someone/else")


def test_the_hash_is_of_what_decides_the_codes() -> None:
    model = small((2, 4))
    before = model.content_hash()
    with torch.no_grad():
        model.image_decoder[0].weight.add_(1)
    assert model.content_hash() == before
    with torch.no_grad():
        model.quantizers[0].codebook[0].add_(1)
    assert model.content_hash() != before


def test_level_dropout_leaves_out_finer_levels_for_its_share_of_the_images() -> None:
    model = small((2, 2, 4), level_dropout=0.4)
    embeddings = [torch.ones(500, 8, *grid) for grid in ((2, 3), (4, 6), (8, 12))]
    dropped = [model._drop_finer_levels(embeddings) for _ in range(4)]
    kept = (
        torch.stack([torch.stack([e.amax(dim=(1, 2, 3)) for e in levels]) for levels in dropped])
        .transpose(0, 1)
        .flatten(1)
    )  # (levels, images)
    assert (kept[0] == 1).all()
    assert (kept[1] >= kept[2]).all()
    assert (1 - kept[2]).mean().item() == pytest.approx(0.4, abs=0.04)
    assert (1 - kept[1]).mean().item() == pytest.approx(0.2, abs=0.04)
    assert not torch.equal(dropped[0][2], dropped[1][2])


def test_level_dropout_is_for_training_with_more_than_one_level() -> None:
    model, images = small((2, 4), level_dropout=0.9), torch.rand(4, 2, 32, 48)
    model(images)
    assert int(model.num_forwards) == 1
    model.eval()(images)
    assert int(model.num_forwards) == 1
