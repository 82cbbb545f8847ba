"""How unusual images are: what the priors say, at any number of processes, and where it shows."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import VQVAE2Pipeline, scoring
from pipelines.commands import compress, score
from pipelines.scoring import ALL, Normal
from tests.conftest import command, two_processes
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.pictures import to_pil
from vqvae2.config import ImagesConfig, PrepareConfig
from vqvae2.data import as_images, load_picture, to_images
from vqvae2.data.prepared import prepare_command
from vqvae2.model import VQVAE2


@pytest.fixture(scope="module")
def pipeline(run: Path) -> VQVAE2Pipeline:
    return VQVAE2Pipeline.from_pretrained(run / "pipeline")


@pytest.fixture
def few(photos: Path, tmp_path: Path) -> Path:
    """Six of the photos."""
    for path in sorted(photos.rglob("*.png"))[::25]:
        (tmp_path / "few").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "few")
    return tmp_path / "few"


def test_scores_are_what_the_priors_say(pipeline: VQVAE2Pipeline, photos: Path) -> None:
    paths = sorted(photos.rglob("*.png"))[::4]  # more than one batch
    scores = pipeline.score(paths)
    nats = pipeline.log_likelihood(paths)
    assert torch.allclose(scores.bits, -nats / np.log(2), rtol=1e-5)
    for level, (bits, excess) in enumerate(zip(scores.bits_map, scores.excess_map, strict=True)):
        assert torch.allclose(bits.double().sum((1, 2)), scores.bits[:, level])
        expected = (bits - excess).double().sum((1, 2))
        assert torch.allclose(expected, scores.expected_bits[:, level], rtol=1e-4)
    error = as_images(paths, pipeline.vqvae.config.image)
    error = (error - pipeline.reconstruct(paths, output_type="pt")).square().mean(dim=1)
    assert torch.allclose(scores.reconstruction_error, error, atol=1e-5)

    # The class that explains an image best is that of the fewest bits.
    every, names = pipeline.score(paths[:5], "all"), pipeline.class_names
    each = [pipeline.score(paths[:5], name) for name in names]
    bits = torch.stack([of.bits.sum(1) for of in each], dim=1)
    assert every.bits_by_label is not None
    assert torch.allclose(every.bits_by_label, bits)
    assert not torch.allclose(bits[:, 0], bits[:, 1])
    for i, best in enumerate(bits.argmin(dim=1).tolist()):
        assert every.score[i] == each[best].score[i]
        assert torch.equal(every.bits_map[1][i], each[best].bits_map[1][i])
        assert every.columns(names)["best_label"][i] == names[best]


def test_redraws_add_what_they_change(
    pipeline: VQVAE2Pipeline, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(photos.rglob("*.png"))[: scoring.BATCH + 3]
    images = as_images(paths, pipeline.vqvae.config.image)
    before = pipeline.score(images, "all")
    monkeypatch.setattr(scoring, "REDRAWN", before.unusual_map.quantile(0.95).item())
    marked = scoring.to_redraw(before)
    assert 0 < marked.float().mean() < 1
    assert (marked & ~(before.unusual_map > scoring.REDRAWN)).any()  # around them, too

    # Of each batch on its own, under the class that explains each image best.
    parts, changes = images.split(scoring.BATCH), []
    names = before.best_labels(pipeline.class_names)
    for few, own, first in zip(parts, marked.split(scoring.BATCH), (0, scoring.BATCH), strict=True):
        given = names[first : first + len(few)]
        drawn = pipeline.redraw(few, own, 3, given)
        assert drawn.shape == (3, *few.shape)
        assert not torch.equal(drawn[0], drawn[1])
        changes.append((drawn - few).square().mean(dim=2))
    after = pipeline.score(images, "all", redraws=3)
    usual = scoring.typical_error(pipeline.trainings)
    near = [scoring.around(maps, before.cell // 4) for maps in torch.cat(changes, dim=1)]
    added = (torch.stack(near) / (2 * usual)).sqrt().mean(dim=0)
    assert torch.allclose(after.unusual_map, before.unusual_map + added)

    # The score follows the map; all else is as it was.
    worse = after.unusual_map.amax((1, 2)) > before.unusual_map.amax((1, 2))
    assert 0 < worse.sum() < len(worse)
    assert torch.equal(after.score > before.score, worse)
    assert torch.equal(after.score[~worse], before.score[~worse])
    assert torch.equal(after.bits, before.bits)
    with pytest.raises(UserError, match="redraws"):
        pipeline.score(images, redraws=-1)


def test_only_cells_with_a_marked_pixel_are_drawn_anew(pipeline: VQVAE2Pipeline) -> None:
    images = pipeline(3, output_type="pt").images
    marked = torch.zeros(3, 16, 16, dtype=torch.bool)
    marked[1, 5, 9] = True
    drawn, cell = pipeline.redraw(images, marked, 4), 16 // pipeline.vqvae.config.grids[-1][0]
    inside = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    top, left = 5 // cell * cell, 9 // cell * cell
    inside[1, :, top : top + cell, left : left + cell] = True
    assert torch.equal((drawn != images).any(dim=0) & ~inside, torch.zeros_like(inside))
    assert (drawn != images).any()
    (same,) = pipeline.redraw(images, marked[:1].expand(3, 16, 16))
    assert torch.equal(same, images)


def test_two_processes_and_a_killed_one_write_the_same_table(
    run: Path, few: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ("score", few, "--data.validation-path", photos / "bag")
    arguments += ("--pipeline", run / "pipeline", "--redraws", 2, "--output-dir")
    two_processes(*arguments, two)
    with monkeypatch.context() as patch:
        patch.setattr(score, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        command(*arguments, one, code=130)
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE2Pipeline, "score", None)  # nothing is scored again
        command(*arguments, one)
        (one / "parts").mkdir()  # as if it was killed before it removed them
        command(*arguments, one)
    assert not (one / "parts").exists()
    table = pq.read_table(one / "scores.parquet")
    assert table.equals(pq.read_table(two / "scores.parquet"))
    assert (one / "scores.csv").read_bytes() == (two / "scores.csv").read_bytes()
    number = len(list((photos / "bag").iterdir()))
    assert table["split"].to_pylist() == ["train"] * 6 + ["validation"] * number
    assert {path.name for path in one.glob("*.png")} == {"histogram.png", "extremes.png"}


def test_thresholds_hold_what_they_promise() -> None:
    """Of 2,000 sets of 99 normal scores and a new one, a tenth marks it at a rate of a tenth."""
    random, marked, marked_places = np.random.default_rng(0), 0, 0
    for *known, new in random.gumbel(size=(2000, 100)):
        stored = Normal(None, "", tuple(known), tuple(2 * place for place in known))
        at, at_place = stored.thresholds(0.1)
        marked += new > at
        marked_places += 2 * new > at_place
        assert (new > at) == (stored.p_values(np.array([new]))[0] <= 0.1)
    assert marked / 2000 == pytest.approx(0.1, abs=0.02)
    assert marked_places == marked
    with pytest.raises(UserError, match=r"rate of 0.001 takes 999 normal .* at least 0.01\."):
        stored.thresholds(0.001)


def test_what_is_unusual_is_marked_drawn_anew_and_shown(
    run: Path, few: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing is marked before it is known what is normal: what the training held out.
    folder = shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    own = ("--pipeline", folder, "--output-dir")
    marks = ("--false-alarm-rate", 0.5, "--maps", "--heal")
    command("score", few, *own, tmp_path / "a", *marks, code=2)
    assert "run vqvae2 score --calibrate" in capsys.readouterr().err
    command("score", photos, *own, tmp_path / "normal", "--calibrate")
    held_out = pq.read_table(tmp_path / "normal" / "scores.parquet")
    assert set(held_out["split"].to_pylist()) == {"validation"}
    assert 0 < len(held_out) < 30
    (folder / "normal.json").unlink()  # what was lost comes back from the table
    command("score", photos, *own, tmp_path / "normal", "--calibrate")
    assert len(read_json(folder / "normal.json")["scores"]) == len(held_out)
    command("score", few, *own, tmp_path / "newer", "--calibrate")
    newer = read_json(folder / "normal.json")
    assert (
        "these are not the images that the pipeline was trained on, or" in capsys.readouterr().err
    )
    command("score", photos, *own, tmp_path / "normal", "--calibrate")  # says so, and leaves it
    assert read_json(folder / "normal.json") == newer
    assert "is of other images, and is kept" in capsys.readouterr().err
    command("score", few, *own, tmp_path / "a", *marks, "--labels", "bag", code=2)
    assert "labels = None" in capsys.readouterr().err
    command("score", few, *own, tmp_path / "a", *marks, "--redraws", 2, code=2)
    assert "redraws = 0: give these" in capsys.readouterr().err
    command("score", photos, *own, tmp_path / "normal", "--redraws", 2, "--calibrate", code=2)
    assert "holds a run with redraws = 0" in capsys.readouterr().err

    # Half of them are marked. Where nothing is, nothing changes.
    pipeline = VQVAE2Pipeline.from_pretrained(folder)
    scores = pipeline.score(sorted(few.iterdir()))
    stored = read_json(folder / "normal.json")
    for name, of in (("scores", scores.score), ("places", scores.unusual_map.amax((1, 2)))):
        stored[name] = [of.double().sort().values[2:4].mean().item()] * 9
    write_json(folder / "normal.json", stored)
    command("score", few, *own, tmp_path / "a", *marks)
    table = pq.read_table(tmp_path / "a" / "scores.parquet").to_pylist()
    for column in ("unusual", "unusual_pixels"):
        assert {bool(row[column]) for row in table} == {False, True}
    assert {path.name for path in (tmp_path / "a" / "maps").iterdir()} == {
        path.name for path in few.iterdir()
    }
    config = pipeline.vqvae.config.image
    for row in table:
        (before,) = to_pil(to_images(load_picture(few / row["image"], config)))
        after = Image.open(tmp_path / "a" / "healed" / row["image"])
        assert (after.tobytes() != before.tobytes()) == (row["unusual_pixels"] > 0)


def test_prepared_images_are_scored_compressed_and_reconstructed(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    image = VQVAE2.from_pretrained(run / "vqvae").config.image
    data, prepared = ImagesConfig(path=str(photos)), tmp_path / "prepared"
    prepare_command(PrepareConfig(data=data, image=image, output_dir=str(prepared)))
    own = ("--pipeline", run / "pipeline", "--output-dir")
    command("score", prepared, *own, tmp_path / "scores")
    number = len([*photos.rglob("*.png")])
    assert len(pq.read_table(tmp_path / "scores" / "scores.parquet")) == number
    command("compress", prepared, *own, tmp_path / "packed", "--fast")
    reconstruct = ("reconstruct", "--vqvae", run / "vqvae", "--data.path", prepared)
    command(*reconstruct, "--output-dir", tmp_path / "again")
    assert len([*(tmp_path / "again" / "images").rglob("*.png")]) == 64  # by default


def test_classes_that_are_numbers_are_healed_by_their_names(
    pipeline: VQVAE2Pipeline, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, given = pipeline.score(sorted(few.iterdir()), ALL), []
    best = scores.bits_by_label.argmin(dim=1)

    def inpaint(self: VQVAE2Pipeline, images: Tensor, *_: Any, **options: Any) -> Any:
        given.extend(options["labels"])
        return SimpleNamespace(images=images)

    monkeypatch.setattr(VQVAE2Pipeline, "class_names", ("2", "3", "1"))
    monkeypatch.setattr(VQVAE2Pipeline, "inpaint", inpaint)
    images = torch.zeros(len(best), 1, 16, 16)
    labels = scores.best_labels(pipeline.class_names)
    pipeline.redraw(images, torch.ones(len(best), 16, 16, dtype=torch.bool), labels=labels)
    assert given == [("2", "3", "1")[place] for place in best]


def test_images_are_compressed_by_one_process(
    run: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two = SimpleNamespace(num_processes=2)
    there = compress.refuse_several_processes.__module__  # imported before, with what is real
    monkeypatch.setattr(f"{there}.processes", lambda: two)
    own = ("--pipeline", run / "pipeline", "--output-dir", tmp_path / "out")
    command("compress", few, *own, code=2)
    assert "this command runs in one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_classes_that_begin_alike_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.commands.score.draw_panel", lambda _, curves, **__: curves)
    labels = ["defect_type_a", "defect_type_b", "ok"]
    curves: Any = score._histogram(pa.table({"label": labels, "score": [1.0, 2.0, 3.0]}))
    assert len(curves) == 3
