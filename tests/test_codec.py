"""Images as bytes: what is decompressed is what was compressed, or it is refused."""

import json
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import VQVAE2Pipeline, codec
from pipelines.codec import (
    HEADER,
    Codec,
    StreamReader,
    rounded,
    safest_nudge,
    scaled_probabilities,
)
from prior.base import Prior
from prior.config import (
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    TransformerConfig,
    TransformerPriorConfig,
)
from prior.pixelsnail import PixelSNAIL
from prior.probes import Rows, fresh_copy, nats_per_row, random_rows
from prior.transformer import TransformerPrior
from tests.conftest import command
from vqvae2.common.errors import UserError


@pytest.fixture(scope="module")
def coder(run: Path) -> Codec:
    return Codec(VQVAE2Pipeline.from_pretrained(run / "pipeline"))


@pytest.fixture(scope="module")
def codes(coder: Codec, photos: Path) -> tuple[Tensor, ...]:
    return coder.pipeline.encode(sorted(photos.rglob("*.png"))[:20])


def small_prior(family: str) -> Prior:
    facts: Any = {"level": 1, "grids": ((2, 2), (4, 4)), "codebook_sizes": (32, 300)}
    facts |= {"class_names": ("a", "b"), "label_dropout": 0.1}
    if family == "pixelsnail":
        return PixelSNAIL(
            PixelSNAILPriorConfig(**facts, network=PixelSNAILConfig(width=32, num_blocks=1))
        )
    network = TransformerConfig(width=32, num_layers=3, num_heads=2)
    return TransformerPrior(TransformerPriorConfig(**facts, network=network))


def by_steps(prior: Prior, rows: Rows) -> Tensor:
    """Logits `(T, B, K)` as decoding computes them."""
    own, condition, labels, _ = rows
    step = prior.make_stepper(len(own), condition, labels, compiled=False)
    before, logits = torch.full((len(own), 1), prior.config.codebook_sizes[-1]), []
    for position, row in enumerate(own.flatten(1).T):
        logits.append(step(position, torch.full((len(own),), position), before)[:, 0])
        before = row[:, None]
    return torch.stack(logits)


@pytest.mark.parametrize("family", ["transformer", "pixelsnail"])
@torch.no_grad()
def test_one_pass_and_single_steps_give_the_same_integers(family: str) -> None:
    """In float64, whatever the batch; in float32 they would not be the same."""
    prior = fresh_copy(small_prior(family), noise=True).double()
    rows = random_rows(prior, 8)
    at_once = prior(*rows).flatten(2).permute(2, 0, 1)
    two = Rows(rows.codes[:2], [level[:2] for level in rows.condition], rows.labels[:2])
    for logits, other in ((by_steps(prior, rows), at_once), (by_steps(prior, two), at_once[:, :2])):
        for scale in (lambda x: x.softmax(-1) * 2**16, scaled_probabilities):
            nudge = safest_nudge(scale(other))
            assert torch.equal(rounded(scale(logits), nudge), rounded(scale(other), nudge))
    in_fp32 = [by_steps(prior.float(), rows), prior(*rows).flatten(2).permute(2, 0, 1)]
    tables = [rounded(scaled_probabilities(logits.double()), 0) for logits in in_fp32]
    assert not torch.equal(*tables)


def test_codebooks_that_the_coder_cannot_hold_are_refused() -> None:
    most = codec.MOST_CODES
    assert 2 ** codec.precision(most) <= codec.LOWEST < 2 ** codec.precision(most + 1)
    config = mock.Mock(codebook_size_per_level=(4, most + 1), grids=((1, 1), (2, 2)))
    with pytest.raises(UserError, match="at most 2,097,152 to be compressed"):
        Codec(mock.Mock(**{"vqvae.config": config}))


def test_the_nudge_keeps_rounding_from_hanging_on_last_digits() -> None:
    """Errors a hundred times those of float64 change no integer of half a million."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 512, generator=generator, dtype=torch.float64) * 3
    scaled = scaled_probabilities(logits)
    scaled[0, 0] = 7 - 0.5 / codec.NUDGES  # turns at the nudge 0
    nudge = safest_nudge(scaled)
    sizes = rounded(scaled, nudge)
    for error in (-1e-13, 1e-13):
        assert torch.equal(rounded(scaled * (1 + error), nudge), sizes)
        if error < 0:
            assert not torch.equal(rounded(scaled * (1 + error), 0), rounded(scaled, 0))
    assert int(sizes.min()) == 1
    assert int(sizes.sum(dim=1).max()) <= 2 ** codec.precision(512)


@pytest.mark.parametrize(("number", "most"), [(80 * 256, 0.01), (5120 * 20, 0.001)])
def test_streams_cost_little_more_than_the_entropy(number: int, most: float) -> None:
    """What a whole file of one chunk costs beyond it: 1 % at 80 codes, 0.1 % at 5,000 per image."""
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.dirichlet(np.full(512, 0.02)))
    symbols = torch.from_numpy(rng.choice(512, number, p=p.numpy()))
    entropy = -p[symbols].log2().sum().item()
    assert 2 < entropy / number < 4
    sizes = rounded(scaled_probabilities(p.clamp(min=1e-30).log()), 0)
    ends = sizes.cumsum(0)
    pairs = zip((ends - sizes)[symbols].tolist(), sizes[symbols].tolist(), strict=True)
    stream = codec.write_stream([*pairs], codec.precision(512), 12345)
    others = codec.HEADER.size + 2 * codec.LENGTH.size + 5  # the other level's, and the header
    assert 8 * (len(stream) + others) < (1 + most) * entropy
    reader = StreamReader(stream, codec.precision(512))
    assert [reader.read(ends.numpy()) for _ in range(500)] == symbols[:500].tolist()


@pytest.mark.parametrize("fast", [False, True])
def test_codes_come_back_whatever_the_batches(
    coder: Codec, codes: tuple[Tensor, ...], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coder, "batch", 3)
    monkeypatch.setattr(coder, "chunk", 6)  # of 20 images: three whole chunks and a piece
    data = coder.compress(codes, [f"{i}.png" for i in range(20)], fast=fast)
    assert all(map(torch.equal, coder.decompress(data), codes))
    assert coder.read_header(data, "it")[2] == [f"{i}.png" for i in range(20)]
    (top,) = coder.decompress(data, levels=1)
    assert torch.equal(top, codes[0])


def test_a_file_costs_what_the_priors_say(coder: Codec, codes: tuple[Tensor, ...]) -> None:
    rows = [Rows(own, list(codes[:level]), None) for level, own in enumerate(codes)]
    for level, each in enumerate(rows):
        rows[level] = each._replace(labels=coder._given(each.condition, len(each.codes))[1])
    pairs = zip(coder.priors, rows, strict=True)
    entropy = sum(nats_per_row(*pair).sum().item() for pair in pairs) / math.log(2) / 8
    fixed = codec.HEADER.size + 2 * (codec.LENGTH.size + 1 + 5)
    assert entropy < len(coder.compress(codes)) < 1.002 * entropy + fixed


@pytest.mark.parametrize("fast", [False, True])
def test_whatever_is_altered_is_found(coder: Codec, codes: tuple[Tensor, ...], fast: bool) -> None:
    """Bits, bytes, missing and added pieces, anywhere: one sentence, and never other codes."""
    rng, names = random.Random(0), ["x", "y", "z"]
    few = [level[:3] for level in codes]
    data = coder.compress(few, names, fast=fast)
    for trial in range(150 if fast else 40):
        altered, place = bytearray(data), rng.randrange(len(data))
        if trial % 5 == 0:
            altered = altered[:place]
        elif trial % 5 == 1:
            altered[place:place] = rng.randbytes(rng.choice((1, 4, 40)))
        elif trial % 5 == 2:
            del altered[place : place + rng.choice((1, 4, 40))]
        else:
            altered[place] ^= 1 << rng.randrange(8) if trial % 5 == 3 else rng.randrange(1, 256)
        for levels in (None, 1):
            try:
                found = coder.decompress(bytes(altered), levels=levels)
            except UserError:
                continue
            assert levels == 1, "altered, and not found"  # behind the top
            assert torch.equal(found[0], few[0])


def test_each_refusal_says_what_is_wrong(
    coder: Codec, codes: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = coder.compress(codes)
    other = data[:6] + bytes(8) + data[14:]
    others = [f"{i}.png" for i in range(1, len(codes[0]))]
    with monkeypatch.context() as unchecked:  # as another program may write it
        unchecked.setattr(codec, "check_names", lambda *_: None)
        no_name, no_text = (coder.compress(codes, [name, *others]) for name in ("a\0b", "\ud800"))
    for wrong, words in (
        (b"PNG", "no .vq2 file"),
        (data[:4] + b"\x09" + data[5:], "version 9 of the coder"),
        (other, "by the pipeline 0000000000000000, but this one is"),
        (data[:-1], "within level 2 of 2.*--levels 1"),
        (data[: codec.HEADER.size + 9], "within level 1 of 2"),
        (data + b"x", "altered, or this machine"),
        (no_name, "holds 'a.*b', which is no name"),
        (no_text, "which is not UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            coder.decompress(wrong)
    with pytest.raises(UserError, match="the archive names 'same' more than once"):
        coder.compress(codes, ["same"] * len(codes[0]))
    monkeypatch.setattr(
        coder.priors[1].get_parameter("head.bias"), "data", torch.randn(32).double()
    )
    with pytest.raises(UserError, match="this machine computes other probabilities"):
        coder.decompress(data)
    monkeypatch.undo()
    monkeypatch.setattr(VQVAE2Pipeline, "can_hide_all", False)
    with pytest.raises(UserError, match=r"without label dropout.*--fast"):
        Codec(coder.pipeline).compress(codes)
    Codec(coder.pipeline).compress(codes, fast=True)
    with pytest.raises(UserError, match=r"cannot draw unknown classes: leave out --imagine"):
        Codec(coder.pipeline).decode(codes[:1], imagine=True)


def test_compressed_images_come_back_under_their_names(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an archive, from files of their own, coarse or with imagined details, marked so."""
    own = ("--pipeline", run / "pipeline", "--output-dir")
    few = tmp_path / "few"
    for path in sorted(photos.rglob("*.png"))[::30]:
        (few / path.parent.name).mkdir(parents=True, exist_ok=True)
        (few / path.parent.name / path.name).write_bytes(path.read_bytes())
    command("compress", few, *own, tmp_path / "one")
    command("compress", few, *own, tmp_path / "each", "--separate", "--fast")
    command("decompress", tmp_path / "one/images.vq2", *own, tmp_path / "a")
    command("decompress", tmp_path / "each", *own, tmp_path / "b")
    command("decompress", tmp_path / "each", *own, tmp_path / "c", "--levels", 1)
    command("decompress", tmp_path / "one", *own, tmp_path / "d", "--levels", 1, "--imagine")
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    for path in few.rglob("*.png"):
        name = path.relative_to(few)
        (expected,) = pipeline.reconstruct(path)
        for folder in ("a", "b"):
            assert Image.open(tmp_path / folder / name).tobytes() == expected.tobytes()
        coarse = Image.open(tmp_path / "c" / name.with_suffix(".coarse.png"))
        imagined = Image.open(tmp_path / "d" / name.with_suffix(".imagined.png"))
        assert len({expected.tobytes(), coarse.tobytes(), imagined.tobytes()}) == 3
        facts = [json.loads(picture.text["vqvae2"]) for picture in (coarse, imagined)]
        assert [(fact["levels"], fact["imagined"]) for fact in facts] == [(1, False), (1, True)]
    assert len([*tmp_path.glob("[abcd]/**/*.png")]) == 4 * len([*few.rglob("*.png")])

    # Another archive is other images; several have a folder each.
    command("decompress", tmp_path / "each", *own, tmp_path / "a", code=2)
    command("compress", few / "bag", *own, tmp_path / "two")
    files = (tmp_path / "one/images.vq2", tmp_path / "two", tmp_path / "each")
    command("decompress", *files, *own, tmp_path / "e")
    folders = {path.relative_to(tmp_path / "e").parts[0] for path in tmp_path.glob("e/**/*.png")}
    assert folders == {"one", "two", "each"}
    there, here = few / "bag", tmp_path / "e" / "two" / "images"
    assert sorted(p.name for p in here.iterdir()) == sorted(p.name for p in there.iterdir())

    # Nor is an archive overwritten by one of other images.
    command("compress", few / "bag", *own, tmp_path / "one", code=2)


def test_of_several_files_one_of_which_is_damaged_none_is_written(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a number of images that is none take for ever, or an absolute path leave home."""
    own = ("--pipeline", run / "pipeline", "--output-dir")
    paths = sorted((photos / "bag").iterdir())[:3]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    command("compress", tmp_path / "list.txt", *own, tmp_path / "x", "--separate", "--fast")
    files = sorted((tmp_path / "x").glob("*.vq2"))
    assert [file.stem for file in files] == [path.stem for path in paths]
    for place in (HEADER.size - 5, -1):  # the number of images, and codes
        broken = bytearray(files[2].read_bytes())
        broken[place] ^= 0xFF
        (tmp_path / "x" / "z.vq2").write_bytes(broken)
        command("decompress", tmp_path / "x", *own, tmp_path / "out", code=2)
        assert "z.vq2 was altered" in capsys.readouterr().err
    assert not [*(tmp_path / "out").rglob("*.png")]
    command("compress", tmp_path / "list.txt", *own, tmp_path / "y", "--fast")
    _, _, names, _ = Codec(VQVAE2Pipeline.from_pretrained(run / "pipeline")).read_header(
        (tmp_path / "y" / "images.vq2").read_bytes(), ""
    )
    assert names == [path.name for path in paths]


def test_what_holds_no_image_that_can_be_read_compresses_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture")
    words = ("--pipeline", run / "pipeline", "--data.on-error", "skip", "--output-dir")
    command("compress", tmp_path / "bad", *words, tmp_path / "out", code=2)
    assert "no image can be read" in capsys.readouterr().err
    assert not [*(tmp_path / "out").rglob("*.*")]
