"""Sampling as a whole: an image is a function of (seed, index, label), a set can be continued, and
what is known is kept."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines import VQVAE2Pipeline
from pipelines.commands.assemble import assemble
from pipelines.commands.doctor import examine, load
from pipelines.config import AssembleConfig, DoctorConfig, SetConfig
from pipelines.editing import keep_levels, known_outside, repeat_known
from pipelines.receipts import make_receipt
from pipelines.samples import write_samples
from prior import (
    Known,
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    Prior,
    PriorConfig,
    SamplingConfig,
    load_prior,
    make_prior,
)
from prior.sampling import probabilities
from tests.conftest import command as run_here
from tests.conftest import kill_when, two_processes
from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.pictures import to_pil
from vqvae2.data import load_picture, to_images


@pytest.fixture
def pipeline(run: Path) -> VQVAE2Pipeline:
    return VQVAE2Pipeline.from_pretrained(run / "pipeline")


def test_from_python_too_convolutions_are_in_fp32_proper(
    pipeline: VQVAE2Pipeline, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has called `processes()`: on a GPU they would be in TF32, and codes would change."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    top, bottom = pipeline.priors
    own = ("grids", "codebook_sizes", "level", "class_names", "label_dropout", "codes_hash")
    facts = {name: getattr(bottom.config, name) for name in (*own, "encoder_hash")}
    network = PixelSNAILConfig(width=8, residual_channels=8, num_blocks=1, num_heads=1)
    snail = make_prior(PixelSNAILPriorConfig(network=network, **facts))
    whole = VQVAE2Pipeline(pipeline.vqvae, [top, snail])
    seen: list[bool] = []
    for module in [*whole.vqvae.modules(), *whole.priors[1].modules()]:
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    images = sorted(photos.rglob("*.png"))[:2]
    works = (
        lambda: whole(2, parallel_positions=2),
        lambda: whole.reconstruct(images),
        lambda: whole.variations(images[0]),
        lambda: whole.log_likelihood(images),
        lambda: whole.score(images),
    )
    for work in works:
        seen.clear()
        work()
        assert seen
        assert not any(seen)


def test_an_image_is_a_function_of_seed_index_and_label(pipeline: VQVAE2Pipeline) -> None:
    """The same bits whatever is asked for with it: alone, in threes, in eights, from the middle of
    a batch, across batches."""
    options = {"seed": 3, "lanes": 4, "output_type": "pt", "guidance_scale": [1.0, 2.0]}
    options["min_p"] = 0.01
    whole = pipeline(11, **options)
    for first, number in ((0, 1), (5, 1), (0, 3), (2, 3), (3, 8), (10, 1)):
        some, asked = pipeline(number, first_index=first, **options), slice(first, first + number)
        assert torch.equal(some.images, whole.images[asked])
        for level, in_whole in zip(some.codes, whole.codes, strict=True):
            assert torch.equal(level, in_whole[asked])
    same_label = pipeline(11, labels=[0, 1, 2], **options)
    other_label = pipeline(11, labels=[0, 2, 1], **options)
    other_seed = pipeline(11, **{**options, "seed": 4})
    assert torch.equal(whole.images, same_label.images)
    assert torch.equal(whole.images[::3], other_label.images[::3])  # their own labels are the same
    assert not torch.equal(whole.images, other_label.images)
    assert not torch.equal(whole.codes[1], other_seed.codes[1])


def test_a_set_of_samples_is_continued_and_extended(run: Path, tmp_path: Path) -> None:
    whole, partial = tmp_path / "whole", tmp_path / "partial"
    sample = ("sample", "--pipeline", run / "pipeline", "--lanes", 4, "--output-dir")
    run_here(*sample, whole, "--num-images", 30, "--npz")
    kill_when((partial / "images/000005.png").exists, *sample, partial, "--num-images", 18)
    made = (partial / "images/000000.png").stat().st_mtime_ns
    run_here(*sample, partial, "--num-images", 24, "--npz")
    run_here(*sample, partial, "--num-images", 30)  # samples.npz grows with the set
    run_here(*sample, partial, "--num-images", 29, code=2)  # whose receipt would not be of 30
    names = [f"images/{i:06d}.png" for i in range(30)]
    assert (partial / names[0]).stat().st_mtime_ns == made
    for name in (*names, "receipt.json"):
        assert (whole / name).read_bytes() == (partial / name).read_bytes()
    with np.load(partial / "samples.npz") as arrays:
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((30, 16, 16, 1), np.uint8)
        assert arrays["arr_1"].tolist() == [0, 1, 2] * 10
        assert np.array_equal(arrays["arr_0"][7, ..., 0], np.asarray(Image.open(whole / names[7])))


def test_samples_are_written_from_python_too(pipeline: VQVAE2Pipeline, tmp_path: Path) -> None:
    settings = SetConfig(num_images=2, seed=3, temperature=(0.5,))
    write_samples(pipeline, tmp_path, make_receipt(pipeline, settings, labels="bag"))
    (_, expected) = pipeline(2, labels="bag", seed=3, temperature=0.5).images
    assert Image.open(tmp_path / "images/000001.png").tobytes() == expected.tobytes()


def altered(image: Path, **changes: object) -> Path:
    """A copy of a sample, beside it, whose receipt says something else."""
    ((key, value),) = changes.items()
    picture, note, path = Image.open(image), PngInfo(), image.with_stem(f"{key}-{value}")
    note.add_text("vqvae2", json.dumps({**json.loads(picture.text["vqvae2"]), **changes}))
    picture.save(path, pnginfo=note)
    return path


def test_a_sample_is_drawn_again_by_the_receipt_that_it_holds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole sets, single images of them, in any order; what was changed is found."""
    out, image = tmp_path / "out", tmp_path / "out/images/000005.png"
    drawn_by = ("--pipeline", run / "pipeline")
    sample = ("sample", *drawn_by, "--num-images", 6, "--seed", 7, "--lanes", 4)
    run_here(*sample, "--top-k", 9, "--labels", 2, "none", "bag", "--output-dir", out)
    receipt = json.loads(Image.open(image).text["vqvae2"])
    assert (receipt["index"], receipt["label"], receipt["lanes"]) == (5, "bag", 4)
    run_here("verify", out, *drawn_by)
    assert "yes: 6 of 6 images are" in capsys.readouterr().out
    (one, two) = two_processes("verify", image, out, out / "images/000000.png", *drawn_by)
    assert (one.stdout[:6], two.stdout) == ("yes: 6", "")

    # A pixel, the receipt, or both at once.
    picture = Image.open(image)
    picture.putpixel((3, 4), picture.getpixel((3, 4)) ^ 64)
    picture.save(image, pnginfo=PngInfo())
    run_here("verify", image, *drawn_by, code=2)
    assert "holds no receipt" in capsys.readouterr().err
    note = PngInfo()
    note.add_text("vqvae2", json.dumps(receipt))
    picture.save(image, pnginfo=note)
    run_here("verify", out, *drawn_by, code=1)
    shown = capsys.readouterr().out
    assert "000005.png: no: 1 of 256 pixels differ, by at most 64 of 255.\nno: 5 of 6" in shown
    whole = out / "images/000004.png"
    changes = [{"seed": 8}, {"index": 2}, {"label": "dress"}, {"label": "hat"}, {"index": -1}]
    run_here("verify", whole, *(altered(whole, **change) for change in changes), *drawn_by, code=1)
    shown = capsys.readouterr().out
    assert "its receipt asks for the impossible (label 'hat' names no class" in shown
    assert "no: 1 of 6 images" in shown
    for changes, sentence in (
        ({"pipeline_hash": "0"}, "drawn by the pipeline 0, but this pipeline is"),
        ({"sampler_version": 1}, "drawn by version 1 of the sampler, but this is version"),
        (
            {"known_hash": "0"},
            "was edited, and its receipt holds only a hash of its given codes (0)",
        ),
    ):
        run_here("verify", whole, altered(whole, **changes), *drawn_by, code=2)
        assert sentence in capsys.readouterr().err


def test_a_receipt_makes_its_set_again(run: Path, tmp_path: Path) -> None:
    drawn_by, receipt = ("--pipeline", run / "pipeline"), tmp_path / "one/receipt.json"
    settings = ("--num-images", 5, "--seed", 7, "--lanes", 2, "--temperature", 1, 0.5)
    run_here(
        "sample", *drawn_by, *settings, "--labels", 2, "none", "--output-dir", tmp_path / "one"
    )
    again = ("sample", *drawn_by, "--receipt", receipt, "--output-dir", tmp_path / "two")
    run_here(*again)
    run_here(*again)  # as any command that is repeated
    files = [*(tmp_path / "one").rglob("*.png"), receipt]
    assert len(files) == 7
    assert receipt.stat().st_size < 1024
    for file in files:
        two = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == two.read_bytes()


def read(pipeline: VQVAE2Pipeline, picture: Path) -> torch.Tensor:
    return to_images(load_picture(str(picture), pipeline.vqvae.config.image))


def test_editing_keeps_what_is_known(pipeline: VQVAE2Pipeline, photos: Path) -> None:
    images = read(pipeline, sorted(photos.rglob("*.png"))[0]).repeat(3, 1, 1, 1)
    codes = [level.codes for level in pipeline.vqvae.encode(images)]
    variations = pipeline(3, known=keep_levels(pipeline.vqvae, images, 1), labels="none")
    assert torch.equal(variations.codes[0], codes[0])
    assert not torch.equal(variations.codes[1], codes[1])

    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, :5, :3] = True  # touches cells (0..1, 0) of the 4 x 4 grid, and (0, 0) of the 2 x 2
    known = known_outside(pipeline.vqvae, images, mask)
    repainted = pipeline(3, known=known, labels="none", first_index=1)
    for level, cells in ((0, [(0, 0)]), (1, [(0, 0), (1, 0)])):
        kept = torch.ones_like(codes[level], dtype=torch.bool)
        for row, column in cells:
            kept[:, row, column] = False
        assert torch.equal(repainted.codes[level][kept], codes[level][kept])
    assert not torch.equal(repainted.codes[1], codes[1])


def test_an_image_file_is_edited(
    pipeline: VQVAE2Pipeline,
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = sorted(photos.rglob("*.png"))[0]
    edit = ("sample", "--pipeline", run / "pipeline", "--init-image", picture, "--num-images", 2)
    nothing = tmp_path / "black.png"
    Image.new("L", (28, 28)).save(nothing)
    run_here(*edit, "--mask", nothing, "--output-dir", tmp_path / "same")
    (expected,) = to_pil(pipeline.vqvae(read(pipeline, picture)).reconstruction)
    sample = Image.open(tmp_path / "same" / "images/000001.png")
    assert sample.tobytes() == expected.tobytes()

    # The sheet shows what was given in front of the samples.
    original = to_pil(read(pipeline, picture))[0]
    page = np.asarray(Image.open(tmp_path / "same" / "samples.png").convert("L"))
    shown = page[4:52, -208:].reshape(48, 4, 52)[..., :48][:, :, 1::3][1::3]  # 16 x 16, times 3
    for place, image in enumerate((original, Image.new("L", (16, 16)), sample, sample)):
        assert np.array_equal(shown[:, place], np.asarray(image))

    # It is drawn again only around the codes of the same picture.
    verify = ("verify", tmp_path / "same", "--pipeline", run / "pipeline")
    run_here(*verify, "--init-image", picture, "--mask", nothing)
    again = ("sample", "--receipt", tmp_path / "same/receipt.json", *verify[2:], "--output-dir")
    for command in (verify, (*again, tmp_path / "x")):
        run_here(*command, code=2)
        assert "was edited, and its receipt holds only a hash" in capsys.readouterr().err
        run_here(*command, "--init-image", picture, code=2)
        assert "give the same picture, mask and --keep-levels" in capsys.readouterr().err
    run_here(*again, tmp_path / "again", "--init-image", picture, "--mask", nothing)
    assert sample.tobytes() == Image.open(tmp_path / "again/images/000001.png").tobytes()
    run_here(*edit, "--mask", tmp_path / "none.png", "--output-dir", tmp_path / "x", code=2)
    assert "none.png cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_images_from_python_are_encoded_decoded_and_edited(
    pipeline: VQVAE2Pipeline, run: Path, photos: Path, tmp_path: Path
) -> None:
    """The same codes as the code dataset's, and the same pictures as the command writes."""
    path, other = sorted(photos.rglob("*.png"))[:2]
    codes = pipeline.encode([path, Image.open(other)])
    held = pq.read_table(sorted((run / "codes").glob("*/*.parquet"))).to_pylist()
    names = [name.relative_to(photos).as_posix() for name in (path, other)]
    rows = {row["id"]: row for row in held}
    for level, grids in enumerate(codes):
        assert grids.flatten(1).tolist() == [rows[name][f"codes_{level}"] for name in names]
    (expected,) = pipeline.reconstruct(path)
    assert (
        pipeline.decode([grids[:1].numpy() for grids in codes])[0].tobytes() == expected.tobytes()
    )
    shown = pipeline.decode(codes, output_type="pt")
    assert (shown.shape, shown.dtype) == ((2, 1, 16, 16), torch.float32)

    # As the command line does.
    nothing, corner = np.zeros((28, 28), bool), Image.new("L", (28, 28))
    corner.paste(255, (0, 0, 9, 9))
    corner.save(tmp_path / "corner.png")
    edit = ("sample", "--pipeline", run / "pipeline", "--init-image", path, "--num-images", 3)
    for name, more, output in (
        ("varied", (), pipeline.variations(path, num_images=3, seed=5)),
        ("painted", ("--mask", tmp_path / "corner.png"), pipeline.inpaint(path, corner, 3, seed=5)),
    ):
        run_here(*edit, *more, "--seed", 5, "--output-dir", tmp_path / name)
        for i, image in enumerate(output.images):
            assert Image.open(tmp_path / name / f"images/{i:06d}.png").tobytes() == image.tobytes()
    assert not torch.equal(output.codes[1][0], output.codes[1][1])
    assert pipeline.inpaint(path, nothing, 1).images[0].tobytes() == expected.tobytes()
    images = read(pipeline, path)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    assert pipeline.inpaint(images, mask, 1).images[0].tobytes() == expected.tobytes()


def test_wrong_codes_masks_and_levels_are_one_sentence(
    pipeline: VQVAE2Pipeline, photos: Path
) -> None:
    path = sorted(photos.rglob("*.png"))[0]
    top, bottom = pipeline.encode(path)
    for call, sentence in (
        (lambda: pipeline.decode([top]), "one per level"),
        (lambda: pipeline.decode(3), "there are no codes"),
        (lambda: pipeline.inpaint(path, None), "of type NoneType"),
        (lambda: pipeline.decode([top, bottom.float()]), "one per level"),
        (lambda: pipeline.decode([top, bottom + 32]), r"codes\[1\]: codes is .* from 0 to 31"),
        (lambda: pipeline.decode([top, bottom], output_type="np"), "'pil' or 'pt'"),
        (lambda: pipeline.inpaint(path, Image.new("L", (9, 28))), "mask has 9 x 28 .* 28 x 28"),
        (lambda: pipeline.inpaint(path, torch.zeros(16, 16)), "of torch.float32 is .*torch.bool"),
        (
            lambda: pipeline.variations(path, keep_levels=2),
            "keep_levels is 2, but must be 1",
        ),
        (lambda: pipeline.variations(path, num_images=-1), "num_images"),
        (lambda: pipeline.log_likelihood(path, [0, 1]), "give one label, or one per image"),
        (lambda: pipeline.log_likelihood(path, "hat"), "names no class"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()


def test_a_model_in_training_encodes_images_without_learning(photos: Path) -> None:
    model = VQVAE2(VQVAE2Config(image=PreprocessingConfig(size=(16,)), hidden_channels=8)).train()
    before = model.content_hash()
    top, bottom = model.encode_images(sorted(photos.rglob("*.png"))[:3])
    assert (top.shape, bottom.shape, top.dtype) == ((3, 2, 2), (3, 4, 4), torch.int64)
    assert model.training
    assert model.content_hash() == before


@pytest.mark.parametrize("labels", [None, "coat", [2, 0, "none"]])
def test_log_likelihood_is_what_the_priors_give_to_the_codes(
    labels: Any, pipeline: VQVAE2Pipeline, photos: Path
) -> None:
    """By their forward pass over the grid, and by the probabilities that sampling draws from."""
    paths = sorted(photos.rglob("*.png"))[::60]
    found, codes = pipeline.log_likelihood(paths, labels), pipeline.encode(paths)
    assert (found.shape, found.dtype) == ((3, 2), torch.float64)
    numbers = torch.tensor([pipeline.label_numbers(labels or "none") * 3][0][:3])
    assert bool((found < 0).all())
    for level, prior in enumerate(pipeline.priors):
        own, condition = codes[level], codes[:level]
        chosen = prior(own, condition, numbers).log_softmax(1).gather(1, own[:, None])
        assert torch.allclose(chosen.sum((1, 2, 3)).double(), found[:, level], atol=1e-4)
        step, previous = prior.make_stepper(3, condition, numbers), own.flatten(1)[:, :1] * 0
        previous, total = previous + prior.config.codebook_sizes[-1], torch.zeros(3).double()
        for position, code in enumerate(own.flatten(1).T):
            logits = step(position, torch.full((3,), position), previous)[:, 0]
            drawn_from = probabilities(logits, SamplingConfig())  # (B, K)
            total += drawn_from[torch.arange(3), code].log()
            previous = code[:, None]
        assert torch.allclose(total, found[:, level], atol=1e-4)
    many = pipeline.log_likelihood(paths * 25, labels if labels is None else "coat")
    assert torch.allclose(many[72:], pipeline.log_likelihood(paths, labels and "coat"), atol=1e-4)


def test_labels_that_the_priors_need_are_asked_for(pipeline: VQVAE2Pipeline, photos: Path) -> None:
    path = sorted(photos.rglob("*.png"))[0]
    with mock.patch.object(VQVAE2Pipeline, "can_hide_labels", False):
        assert pipeline.log_likelihood(path, "bag").shape == (1, 2)
        with pytest.raises(UserError, match="cannot do without labels"):
            pipeline.log_likelihood(path)


def test_a_notebook_shows_in_a_few_lines_what_it_has(pipeline: VQVAE2Pipeline) -> None:
    lines = repr(pipeline).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith(
        "  vqvae: VQVAE2(images 16 x 16, channels 1, codes 2 x 2 of 16 + 4 x"
    )
    assert lines[3].startswith(
        "  prior_1: TransformerPrior(level 1, codes 4 x 4 of 32 given 2 x 2 "
    )
    assert lines[3].endswith(" parameters, cpu)")
    assert lines[4] == "  classes: bag, coat, dress"


def test_another_model_does_not_continue_a_set(
    copy_of_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same encoder, another prior: its images do not belong into the same folder."""
    pipeline = copy_of_run / "pipeline"
    sample = ("sample", "--pipeline", pipeline, "--output-dir", tmp_path / "out", "--num-images")
    run_here(*sample, 4)
    other = VQVAE2Pipeline.from_pretrained(pipeline)
    torch.nn.init.normal_(other.priors[1].head.bias)
    other.save_pretrained(pipeline)
    run_here(*sample, 8, code=2)
    assert "prior_1_hash" in capsys.readouterr().err


def test_another_sampler_does_not_continue_a_set(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sets of the first sampler say no version."""
    sample = ("sample", "--pipeline", run / "pipeline", "--output-dir", tmp_path, "--num-images")
    run_here(*sample, 1)
    record = tmp_path / "sample_config.yaml"
    record.write_text(re.sub("sampler_version: .*\n", "", record.read_text()))
    run_here(*sample, 2, code=2)
    assert "a set of version 1 of the sampler, but this is version" in capsys.readouterr().err
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_known_codes_that_do_not_fit_are_refused(pipeline: VQVAE2Pipeline) -> None:
    known = keep_levels(pipeline.vqvae, torch.zeros(1, 1, 16, 16), 1)
    repeated = pipeline(3, known=repeat_known(known, range(3))).codes[0]
    assert torch.equal(repeated, known[0].codes.repeat(3, 1, 1))
    with pytest.raises(UserError, match="one grid per image"):
        pipeline(3, known=known)
    with pytest.raises(UserError, match="give one per level"):
        pipeline(1, known=known[:1])
    with pytest.raises(UserError, match="temperature is 'hot'"):
        pipeline(1, temperature="hot")
    with pytest.raises(UserError, match="from 0 to 15"):
        pipeline(1, known=[Known(known[0].codes + 16, known[0].mask), None])


def test_labels_are_names_or_numbers(pipeline: VQVAE2Pipeline) -> None:
    assert pipeline.label_numbers(None) == [0, 1, 2]
    assert pipeline.label_numbers(["dress", "1", 0, "none"]) == [2, 1, 0, 3]
    assert pipeline.label_numbers(torch.tensor([2, 0])) == [2, 0]
    for wrong in ("hat", 3, "-1"):
        with pytest.raises(UserError, match="from 0 to 2, or one of bag, coat, dress, or none"):
            pipeline.label_numbers(wrong)


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (["0", "1", "10", "2"], 2, 3),  # as older artifacts sort them
        (["1", "2", "3"], 1, 0),
        (["1", "2", "3"], 0, None),
        (["007", "8"], "7", 0),
        (["3", "a", "b", "c"], 3, None),  # a name, and another's place
        (["3", "a", "b", "c"], 1, 1),
        (["5", "a", "-1"], 5, None),  # a name, and nobody's place
        (["5", "a", "-1"], -1, None),
        (["cafe\u0301", "th\xe9"], "caf\xe9", 0),
        ([str(i) + "x" for i in range(9999)], "y", None),
    ],
)
def test_a_label_has_one_meaning(
    names: list[str], label: int | str, expected: int | None, pipeline: VQVAE2Pipeline
) -> None:
    with mock.patch.object(VQVAE2Pipeline, "class_names", names):
        if expected is not None:
            assert pipeline.label_numbers(label) == [expected]
            return
        what = "names no class"
        if label == 3:
            what = "number of the class 'c', and the name of another: give the name, 'c' or '3'"
        with pytest.raises(UserError, match=what) as error:
            pipeline.label_numbers(label)
        assert len(str(error.value)) < 200


def test_a_label_is_near_a_class(pipeline: VQVAE2Pipeline) -> None:
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "sneaker"]
    with (
        mock.patch.object(VQVAE2Pipeline, "class_names", names),
        pytest.raises(UserError, match="give a number from 0 to 6, or 'sneaker', or none"),
    ):
        pipeline.label_numbers("sneeker")


def test_weights_that_are_no_numbers_are_a_sentence(pipeline: VQVAE2Pipeline) -> None:
    top = pipeline.priors[0].config
    facts = {field.name: getattr(top, field.name) for field in dataclasses.fields(PriorConfig)}
    network = PixelSNAILConfig(width=16, residual_channels=8, num_heads=2)
    snail = make_prior(PixelSNAILPriorConfig(**facts, network=network))
    for broken in (pipeline.priors[0], snail):
        torch.nn.init.constant_(list(broken.parameters())[-1], torch.nan)
        with pytest.raises(UserError, match="not finite"):
            VQVAE2Pipeline(pipeline.vqvae, [broken, pipeline.priors[1]])(1)


def test_a_pipeline_with_a_flipped_byte_or_another_part_is_refused(copy_of_run: Path) -> None:
    folder = copy_of_run / "pipeline"
    weights = folder / "prior_1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 4
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"safetensors was changed after the model was saved"):
        VQVAE2Pipeline.from_pretrained(folder)

    # A whole model that is not the pipeline's own.
    weights.unlink()
    other = load_prior(copy_of_run / "prior_1")
    next(other.parameters()).data[0] += 1
    other.save_pretrained(folder / "prior_1")
    with pytest.raises(UserError, match=r"prior_1 was changed .*: restore its files"):
        VQVAE2Pipeline.from_pretrained(folder)
    found = next(examine(**load(DoctorConfig(pipeline=str(folder)))))
    assert (found.name, found.passed, found.message[:19]) == ("files", False, "prior_1 was changed")
    run_here("sample", "--pipeline", folder, "--output-dir", copy_of_run / "out", code=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vqvae": 1}, "json: vqvae is 1, but must be the name of a folder"),
        ({"priors": [1, 2]}, "json: priors is 1, but"),
        ({"priors": "prior_0"}, "needs"),
        ({"priors": None}, "json: priors is None"),
        ({"vqvae": "../vqvae"}, "json: vqvae is '../vqvae'"),
        ({"vqvae": ".."}, "json: vqvae is '..'"),
        ({"vqvae": ""}, "json: vqvae is ''"),
        ({"vqvae": "/etc"}, "json: vqvae is '/etc'"),
        ({"vqvae": "someone"}, "json: vqvae is 'someone'"),
        ({"vqvae": "link"}, "json: vqvae is 'link'"),
        ({"vqvae_hash": None}, "but model_index.json says None"),
        ({"trainings": [1]}, "json: trainings is"),
        ({"trainings": {"vqvae": "x"}}, "json: trainings is"),
    ],
)
def test_an_index_names_folders_beside_itself(
    change: dict, sentence: str, run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    (folder / "link").symlink_to(run / "vqvae")
    write_json(folder / "model_index.json", {**read_json(folder / "model_index.json"), **change})
    with pytest.raises(UserError, match=re.escape(sentence)):
        VQVAE2Pipeline.from_pretrained(folder)


def test_impossible_levels_and_grids_of_a_prior_are_refused(pipeline: VQVAE2Pipeline) -> None:
    config = pipeline.priors[1].config
    for change in ({"level": -1, "grids": (), "codebook_sizes": ()}, {"codebook_sizes": (16, -5)}):
        with pytest.raises(UserError, match="must be"):
            dataclasses.replace(config, **change)
    for grid in ((4,), (4, 4, 4), (4, 0)):
        with pytest.raises(UserError, match="grids"):
            dataclasses.replace(config, grids=(config.grids[0], grid))


def test_assembling_continues_repairs_and_leaves_alone(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = AssembleConfig(
        vqvae=str(run / "vqvae"),
        priors=(str(run / "prior_0"), str(run / "prior_1")),
        output_dir=str(folder),
    )

    killed = mock.patch.object(Prior, "save_pretrained", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        assemble(config)
    assert not (folder / "model_index.json").exists()
    assemble(config)
    whole = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assemble(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == whole
    (folder / "prior_0" / "model.safetensors").write_bytes(b"cut")
    assemble(config)
    VQVAE2Pipeline.from_pretrained(folder)
    other = load_prior(config.priors[1])
    torch.nn.init.normal_(other.head.bias)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"holds a run of another prior_1 \(prior_1_hash "):
        assemble(dataclasses.replace(config, priors=(config.priors[0], str(tmp_path / "other"))))
