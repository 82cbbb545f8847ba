"""A checkpoint of the widely used implementation gives, in ours, the same codes and images."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pipelines.importers.rosinality_weights import import_weights
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
    assert "64 codes of 16 dimensions" in capsys.readouterr().out
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
        "lacks what we call 'upsamplers.0.0.bias'": without("upsample_t.bias"),
        "'dec.blocks.0.weight' has shape": {**state, "dec.blocks.0.weight": torch.zeros(2, 2)},
        "not a state dict of tensors": {"model": state, "args": 1},
        "of plain tensors": {"hidden": Path("code that would run")},
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
        cases[rf"a layer of shape \(\) where (?#{name})"] = {**state, name: torch.zeros(())}
    for message, content in cases.items():
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            import_weights(tmp_path / "x.pt", (64, 32))
    for text in (b"", b"no", b"a text\n" * 999, b"\x80\x02", CHECKPOINT.read_bytes()[:-999]):
        (tmp_path / "x.pt").write_bytes(text)
        with pytest.raises(UserError, match=r"cannot be read .* save its state_dict"):
            import_weights(tmp_path / "x.pt", (64, 32))
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
    assert "holds a run with checkpoint_sha256" in capsys.readouterr().err
