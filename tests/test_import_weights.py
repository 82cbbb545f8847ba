"""A checkpoint of another implementation gives, in ours, the same codes and images."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipelines.importers.weights import import_weights
from tests.conftest import ROOT, command
from vqvae2 import VQVAE2
from vqvae2.common.errors import UserError

CHECKPOINT = ROOT / "tests" / "data" / "rosinality_stage1.pt"
EXPECTED = load_file(ROOT / "tests" / "data" / "rosinality_stage1_expected.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_codes_and_reconstructions_are_the_originals(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "x.pt")
    flags = ("--checkpoint", tmp_path / "x.pt", "--image.size", 64, 32)
    command("import-weights", *flags, "--output-dir", tmp_path / "model")
    assert "codes 8 x 4 of 64 + 16 x 8 of 64, of 16 and 16 dimensions" in capsys.readouterr().out
    model = VQVAE2.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        codes = [level.codes for level in model.encode(EXPECTED["images"])]
        reconstructions = (model(EXPECTED["images"]).reconstruction, model.decode_codes(codes))
    assert torch.equal(codes[0], EXPECTED["codes_top"])
    assert torch.equal(codes[1], EXPECTED["codes_bottom"])
    for reconstruction in reconstructions:
        assert (reconstruction - EXPECTED["reconstruction"]).abs().max() < 1e-5


def test_the_model_can_be_trained_on() -> None:
    model = import_weights(CHECKPOINT, (64, 32)).train()
    before = model.quantizers[0].codebook.clone()
    model(EXPECTED["images"])
    alive = model.quantizers[0].codebook.norm(dim=1)
    assert torch.isfinite(alive).all()
    assert not torch.equal(before, model.quantizers[0].codebook)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in state.items() if key != name}

    cases = {
        "holds 'extra'": {**state, "extra": torch.zeros(1)},
        "lacks 'quantize_t.embed'": without("quantize_t.embed"),
        "none of the layers that are known": {"layer": torch.zeros(2)},
        "lacks what we call 'upsamplers.0.0.bias'": without("upsample_t.bias"),
        "'dec.blocks.0.weight' has shape": {**state, "dec.blocks.0.weight": torch.zeros(2, 2)},
        "not a state dict of tensors": {**state, "args": 1},
        "of plain tensors.* save the weights alone": {"hidden": Path("code that would run")},
    }
    name = "dec.blocks.0.weight"
    weight = state[name]
    for wrong in (
        *(weight.to(kind) for kind in (torch.int64, torch.bool, torch.complex64)),
        *(weight.to(torch.float8_e4m3fn), weight.to_sparse(), weight.to("meta")),
    ):
        cases[f"{name}' is a tensor of .*{wrong.dtype} on {wrong.device}"] = {**state, name: wrong}
    for number in (torch.nan, torch.inf):
        cases[f"'{name}' holds NaN or inf(?#{number})"] = {**state, name: weight * number}
    cases["holds less than its shape says"] = {**state, name: torch.zeros(1).expand(weight.shape)}
    for name in ("enc_b.blocks.0.weight", "quantize_t.embed"):
        cases[f"layers of other shapes(?#{name})"] = {**state, name: torch.zeros(())}
    for message, content in cases.items():
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            import_weights(tmp_path / "x.pt", (64, 32))
    for text in (b"", b"no", b"a text\n" * 999, b"\x80\x02", CHECKPOINT.read_bytes()[:-999]):
        (tmp_path / "x.pt").write_bytes(text)
        with pytest.raises(UserError, match=r"cannot be read .* it is damaged, or no checkpoint"):
            import_weights(tmp_path / "x.pt", (64, 32))
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"image.size"):
        import_weights(tmp_path / "x.pt", (30,))
    with pytest.raises(UserError, match="does not exist"):
        import_weights(tmp_path / "none.pt", (64, 32))


def test_an_import_continues_and_leaves_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--checkpoint", CHECKPOINT, "--image.size", 64, "--output-dir", tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE2, "save_pretrained", mock.Mock(side_effect=KeyboardInterrupt))
        command("import-weights", *flags, code=130)
    command("import-weights", *flags)
    command("import-weights", *flags)
    assert "imported already" in capsys.readouterr().out
    command("import-weights", *flags, "--image.size", 32, code=2)
    assert "holds a run with image.size = [64]" in capsys.readouterr().err
    state = torch.load(CHECKPOINT, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "x.pt")
    command("import-weights", *flags[2:], "--checkpoint", tmp_path / "x.pt", code=2)
    assert "holds a run of another checkpoint (checkpoint_sha256 " in capsys.readouterr().err


# VQGAN tokenizers


class Original:
    """A tokenizer of three resolutions as its authors' code computes it, written out under their
    names: calling it with images makes random weights as the layers are reached."""

    def __init__(self, author: str) -> None:
        self.state: dict[str, Tensor] = {}
        self.is_llamagen = author == "llamagen"
        self.block, down, up, self.middle = {
            "llamagen": ("res", "conv_blocks", "conv_blocks", ("mid.0", "mid.1", "mid.2")),
            "taming": ("block", "down", "up", ("mid.block_1", "mid.attn_1", "mid.block_2")),
        }[author]
        self.downs = [f"encoder.{down}.{i}" for i in range(3)]
        self.ups = [f"decoder.{up}.{i if self.is_llamagen else 2 - i}" for i in range(3)]

    def weight(self, name: str, *shape: int) -> Tensor:
        return self.state.setdefault(name, torch.randn(shape) * math.prod(shape[1:]) ** -0.5)

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, **options: Any) -> Tensor:
        weight = self.weight(f"{name}.weight", out, x.shape[1], kernel, kernel)
        options = {"padding": kernel // 2} | options
        return F.conv2d(x, weight, self.weight(f"{name}.bias", out), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        parameters = (self.weight(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        return F.group_norm(x, 32, *parameters, eps=1e-6)

    def residual(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out)
        return (x if out == x.shape[1] else self.conv(f"{name}.nin_shortcut", x, out, 1)) + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        h, width = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * width**-0.5).softmax(dim=2)  # queries, keys
        read = (v @ weights.transpose(1, 2)).view_as(x)
        return x + self.conv(f"{name}.proj_out", read, width, 1)

    def stage(self, name: str, x: Tensor, out: int, blocks: int, attention: bool) -> Tensor:
        for block in range(blocks):
            x = self.residual(f"{name}.{self.block}.{block}", x, out)
            x = self.attention(f"{name}.attn.{block}", x) if attention else x
        return x

    def mid(self, part: str, x: Tensor) -> Tensor:
        first, second, third = (f"{part}.{name}" for name in self.middle)
        x = self.attention(second, self.residual(first, x, x.shape[1]))
        return self.residual(third, x, x.shape[1])

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and reconstruction; widths 32, 32, 64 from the image on, features of 48."""
        x = self.conv("encoder.conv_in", images, 32)
        for i, width in enumerate((32, 32, 64)):
            x = self.stage(self.downs[i], x, width, 1, attention=i == 2)
            if i < 2:
                name, padded = f"{self.downs[i]}.downsample.conv", F.pad(x, (0, 1, 0, 1))
                x = self.conv(name, padded, width, stride=2, padding=0)
        x = F.silu(self.norm("encoder.norm_out", self.mid("encoder", x)))
        x = self.conv("quant_conv", self.conv("encoder.conv_out", x, 48), 8, 1)

        vectors = x.movedim(1, -1).flatten(0, 2)  # 48 of them, and near them as many codes
        codebook = vectors + 0.1 * torch.randn_like(vectors)
        self.state["quantize.embedding.weight"] = codebook
        if self.is_llamagen:
            x, codebook = F.normalize(x, dim=1), F.normalize(codebook, dim=1)
        codes = torch.cdist(x.movedim(1, -1), codebook).argmin(dim=-1)
        x = codebook[codes].movedim(-1, 1)

        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", x, 48, 1), 64)
        x = self.mid("decoder", x)
        for i, width in enumerate((64, 32, 32)):
            x = self.stage(self.ups[i], x, width, 2, attention=i == 0)
            if i < 2:
                doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"{self.ups[i]}.upsample.conv", doubled, width)
        x = F.silu(self.norm("decoder.norm_out", x))
        return codes, self.conv("decoder.conv_out", x, 3)


@pytest.mark.parametrize("author", ["llamagen", "taming"])
def test_a_vqgan_tokenizer_gives_its_codes_and_images_and_can_be_trained_on(
    author: str, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    original, images = Original(author), torch.rand(2, 3, 16, 24) * 2 - 1
    codes, reconstruction = original(images)
    content = {
        "llamagen": {"model": {**original.state, "quantize.codebook_used": torch.zeros(9).long()}},
        "taming": {"state_dict": {**original.state, "loss.n": torch.zeros(9).long()}, "epoch": 3},
    }
    torch.save(content[author], tmp_path / "x.pt")
    folder = tmp_path / "model"
    flags = ("--checkpoint", tmp_path / "x.pt", "--image.size", 16, 24, "--output-dir", folder)
    command("import-weights", *flags)
    assert "codes 4 x 6 of 48, of 8 dimensions" in capsys.readouterr().out
    model = VQVAE2.from_pretrained(folder)
    with torch.no_grad():
        output = model(images)
    assert len(codes.unique()) > 10
    assert torch.equal(output.levels[0].codes, codes)
    torch.testing.assert_close(output.reconstruction, reconstruction, atol=1e-4, rtol=0)

    # The recipe beside it goes on from there: the codebook's averages are as if it had been used.
    few = ("--num-steps", 1, "--batch-size", 4, "--learning-rate", 1e-9, "--weight-ema-decay", 0)
    data = ("--config", folder / "finetune.yaml", "--data.path", photos)
    command("train", *data, *few, "--output-dir", tmp_path / "tuned")
    tuned = VQVAE2.from_pretrained(tmp_path / "tuned")
    changed = (tuned.quantizers[0].codebook - model.quantizers[0].codebook).abs().amax(dim=1)
    assert (changed < 0.2).float().mean() > 0.9
