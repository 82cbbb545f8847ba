"""`vqvae2 evaluate` compares what it says it compares, and its words follow from its figures."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.commands import evaluate
from pipelines.evaluation import classifier, memorisation, report
from pipelines.evaluation.figures import rejection
from pipelines.evaluation.memorisation import closeness, hamming
from pipelines.evaluation.metrics import Moments
from pipelines.evaluation.sets import ImageSet, Seen, see
from prior import PriorConfig
from tests.conftest import ROOT, command, two_processes, write_images
from tests.worker_two_processes import small_model
from vqvae2.common.errors import UserError
from vqvae2.common.files import write_json


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What evaluations keep of images stays away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def flags(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The tiny pipeline, and enough images to be held out."""
    held_out = write_images(tmp_path_factory.mktemp("held_out"), 30)
    data = ("--data.path", photos, "--data.validation-path", held_out)
    return ["--pipeline", run / "pipeline", *data, "--num-samples", 24]


@pytest.fixture(scope="module")
def evaluated(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's evaluation, with few settings and hasty classifiers."""
    folder = tmp_path_factory.mktemp("evaluated") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "TEMPERATURES", (0.5, 1.0))
        patch.setattr(evaluate, "TOP_PS", ())
        patch.setattr(evaluate, "GUIDANCES", (1.0,))
        patch.setattr(classifier, "FEWEST_STEPS", 10)
        patch.setattr(classifier, "CELLS", 0)
        command("evaluate", *flags, "--sweep", "--output-dir", folder)
    return folder


def figures_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report" / "figures.json").read_text())


def test_the_report_stands_alone_and_says_what_to_do(evaluated: Path) -> None:
    found, page = figures_of(evaluated), (evaluated / "report" / "index.html").read_text()
    rows = found["against"]["training images"]
    assert [row["count"] for row in rows.values()] == [24, 24, 24]
    assert rows["real"]["distance"] < rows["samples"]["distance"]
    assert found["against"]["held-out images"]["samples"]["reference count"] == 30
    for key in ("levels", "memorised", "stage 1", "prior gaps", "accuracy", "reconstructions"):
        assert found[key], key
    assert [row["temperature"] for row in found["sweep"]] == ["0.5", "1.0", "1.0 0.5"]
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 5 + bool(found.get("rejection"))
    text = " ".join(found["summary"])
    for words in ("FD (classifier) of the samples is", "lose", "look like real", "Of 3 settings"):
        assert words in text
    assert "FID" not in text


def test_it_continues_and_two_processes_find_the_same(
    evaluated: Path, flags: list[object], tmp_path: Path
) -> None:
    """Samples that are there are not made again, and a missing one is; figures are equal."""
    again = tmp_path / "again"
    shutil.copytree(evaluated, again)
    lost, kept = (again / "samples" / "images" / f"{i:06d}.png" for i in (3, 20))
    before, times = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    statistics = tmp_path / "reference.npz"  # as other programs write it, of what this one sees
    np.savez(statistics, mu=np.zeros(224), sigma=np.eye(224))
    more = ("--statistics-file", statistics, "--output-dir", again)
    two_processes(ROOT / "tests" / "worker_evaluate.py", *flags, *more)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == times
    one, two = figures_of(evaluated), figures_of(again)
    assert one["against"] == two["against"]
    assert one["levels"] == two["levels"]
    assert {*two["file"]} == {"samples", "reconstructions", "real"}
    assert all(row["distance"] > 0 for row in two["file"].values())


def test_evaluations_are_compared_if_the_same_eyes_saw_them(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = tmp_path / "better"
    found = figures_of(evaluated)
    found["against"]["training images"]["samples"]["distance"] = 0.5
    write = (better / "report" / "figures.json").write_text
    (better / "report").mkdir(parents=True)
    write(json.dumps(found))
    page = tmp_path / "page"
    command("evaluate", "--compare", evaluated, better, "--output-dir", page)
    assert "better has the lowest FD (classifier)." in capsys.readouterr().out
    alike = [shutil.copytree(evaluated, tmp_path / run / "evaluation") for run in ("x", "y")]
    command("evaluate", "--compare", *alike)
    assert f"{alike[0]} has the lowest" in capsys.readouterr().out  # not "evaluation"
    assert "better" in (page / "comparison.html").read_text()
    found["extractor"]["name"] = "inception"
    write(json.dumps(found))
    command("evaluate", "--compare", evaluated, better, code=2)
    assert "evaluate both with the same images and --features" in capsys.readouterr().err


def test_images_of_another_model(
    evaluated: Path, run: Path, flags: list[object], tmp_path: Path
) -> None:
    """The very samples, given as a folder, get the same figures."""
    given = ("--vqvae", run / "vqvae", "--samples", evaluated / "samples", *flags[2:-2])
    command("evaluate", *given, "--output-dir", tmp_path)
    (one, other) = (figures_of(folder)["against"] for folder in (evaluated, tmp_path))
    assert one["held-out images"] == other["held-out images"]


def test_images_of_another_model_in_class_folders(
    flags: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They have classes, by the names of the folders, so that a classifier learns from them."""
    monkeypatch.setattr(classifier, "FEWEST_STEPS", 10)
    monkeypatch.setattr(classifier, "CELLS", 0)
    others = write_images(tmp_path / "others", 24)
    command("evaluate", "--samples", others, *flags[2:-2], "--output-dir", tmp_path / "out")
    assert figures_of(tmp_path / "out")["accuracy"].keys() == {"real", "samples"}
    assert "no record of its training" not in capsys.readouterr().err  # no model is asked about


def test_levels_of_priors_without_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are sampled without the labels that the images have."""
    given: list[Any] = []
    monkeypatch.setattr(evaluate.memorisation, "codes_of", lambda *_: [torch.zeros(24, 2, 2)] * 2)
    monkeypatch.setattr(evaluate.measure, "compare_briefly", lambda *_: {})
    subject = mock.MagicMock(same_classes=False)
    subject.pipeline.class_names, subject.pipeline.priors = (), [None, None]
    subject.sample = lambda *_, labels, **__: given.append(labels)
    sets = {"real": mock.MagicMock(images=noise(24, 0)), "made": mock.MagicMock()}
    sets["samples"] = mock.MagicMock(images=noise(24, 1))
    sets["reference"] = None
    assert len(evaluate._compare_levels(subject, mock.MagicMock(), sets)) == 3
    assert given == [[]]


def test_a_rare_class_costs_the_accuracy_score_alone(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    labels[0] = 1
    sets = {key: mock.MagicMock(labels=labels) for key in ("real", "samples", "held_out")}
    for each in sets.values():
        each.images = noise(40, 0)
        each.images = replace(each.images, labels=labels.tolist())
    sets["made"] = None
    with mock.patch.object(evaluate, "accuracy_scores", side_effect=UserError("one class")):
        assert evaluate._accuracy(sets, ("a", "b")) == {}
    assert "no accuracy score: one class" in caplog.text


def test_a_sweep_lowers_the_finest_temperature_alone_too() -> None:
    settings = {levels: evaluate._temperatures_and_top_ps(levels) for levels in (1, 2, 3)}
    assert [len(each) for each in settings.values()] == [4, 6, 6]
    assert [each for each in settings[3] if len(each[0]) > 1] == [
        ((1.0, 1.0, 0.8), 1.0),
        ((1.0, 1.0, 0.9), 1.0),
    ]
    assert ((1.0,), 0.95) in settings[1]


def test_a_swept_row_is_told_by_what_it_varies() -> None:
    found = {"guidance_scale": 1.5, "precision": 0.5, "recall": 0.5, "distance": 1.0}
    kinds = {
        ("1.0", 1.0): report.USUAL,
        ("0.9", 1.0): "temperature",
        ("1.0 0.9", 1.0): "the finest level's temperature",
        ("1.0", 0.95): "top-p 0.95",
    }
    rows = [{"temperature": t, "top_p": top_p, **found} for t, top_p in kinds]
    assert [report._kind(row) for row in rows] == [*kinds.values()]
    plain, whole = report._plot(rows[:1], "FD"), report._plot(rows, "FD")
    assert whole.height > 2 * plain.height  # a row of panels for each kind


@pytest.mark.parametrize(
    ("facts", "number"),
    [
        ({"class_names": ("a", "b"), "label_dropout": 0.1}, 3),
        ({"vector_size": 4, "label_dropout": 0.1}, 3),
        ({"label_dropout": 0.1}, 1),
        ({"class_names": ("a", "b")}, 1),
    ],
)
def test_guidance_is_swept_only_where_all_priors_know_it(facts: dict, number: int) -> None:
    seen: list[dict] = []
    subject = mock.MagicMock()
    subject.sample = lambda *_, **settings: seen.append(settings)
    codes: dict[str, Any] = {"level": 0, "grids": ((2, 2),), "codebook_sizes": (8,)}
    guided = PriorConfig(**codes, class_names=("a", "b"), label_dropout=0.1)
    configs = [guided, PriorConfig(**codes, **facts)]
    subject.pipeline.priors = [mock.Mock(config=config) for config in configs]
    with mock.patch.object(evaluate.measure, "compare_briefly", return_value={}):
        evaluate._sweep(subject, mock.MagicMock(num_samples=4), mock.MagicMock())
    assert len({settings["guidance_scale"] for settings in seen}) == number


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--vqvae", "x"], "--data.path is missing"),
        (["--data.path", "x", "--output-dir", "y"], "nothing to evaluate"),
        (["--vqvae", "x", "--sweep"], "sweep is True, but must be used where samples are drawn"),
        (["--vqvae", "x", "--num-samples", "10"], "num_samples is 10, but must be at least 20"),
        (["--samples", "x", "--lpips-file", "y"], "--lpips-file is given without an autoencoder"),
        (["--samples", "x", "--temperature", "0.5"], "temperature is (0.5,), but must be used"),
        (["--vqvae", "x", "--num-samples", "50"], "num_samples is 50, but must be used where"),
        (["--compare", "x", "y", "--pipeline", "z"], "compare is ('x', 'y'), but must be used"),
        (["--compare", "x", "y"], "does not exist"),
        (["--compare", "{inspected}", "x"], "is no evaluation: give folders"),
        (["--compare", "x", "x"], "nothing to compare: give two or more"),
        (["--samples", "{photos}/bag/0000.png", "--data.path", "{photos}", "--output-dir", "{out}"],
         "too few to judge"),
        (["--samples", "{deep}", "--data.path", "{photos}", "--output-dir", "{out}"],
         "holds pictures that are not of 8 bits"),
        (["--vqvae", "{run}/vqvae", "--data.path", "{photos}", "--features", "inception",
          "--output-dir", "{out}"], "inception needs --weights-file"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(
    words: list[str],
    sentence: str,
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inspected = tmp_path / "inspected"
    write_json(inspected / "report" / "figures.json", {"mse": 1.0})
    places = {"run": run, "photos": photos, "out": tmp_path / "out", "inspected": inspected}
    places["deep"] = tmp_path / "deep"
    places["deep"].mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(places["deep"] / "0.tif")
    command("evaluate", *(word.format(**places) for word in words), code=2)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Single parts


class Eyes:
    """An extractor that sees the mean of each quarter of an image."""

    identity, looked = "eyes 1 0", 0

    def __call__(self, images: Tensor) -> Tensor:
        self.looked += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    def probabilities(self, features: Tensor) -> Tensor:
        return features.softmax(dim=1)


def noise(number: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (number, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(
        "noise", number, lambda rows: pixels[list(rows)], [i % 2 for i in range(number)]
    )


def test_what_was_seen_is_not_looked_at_again(tmp_path: Path) -> None:
    eyes, images = Eyes(), noise(30, 0)
    first = see(images, eyes, tmp_path)  # type: ignore[arg-type]
    again = see(images, eyes, tmp_path)  # type: ignore[arg-type]
    assert eyes.looked == 30
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.moments.mean, first.features.double().mean(dim=0))
    assert len(see(noise(30, 1), eyes, tmp_path).rows) == 30  # type: ignore[arg-type]
    assert eyes.looked == 60


def test_reconstructions_of_another_image_decoder_are_looked_at(tmp_path: Path) -> None:
    eyes, images, model = Eyes(), noise(20, 0), small_model().eval()
    for looked in (20, 40):
        see(images.reconstructed(model), eyes, tmp_path)  # type: ignore[arg-type]
        assert eyes.looked == looked
        with torch.no_grad():
            model.last_layer.mul_(0.5)


def test_copies_of_training_images_are_called_and_new_images_are_not(tmp_path: Path) -> None:
    def look(images: ImageSet) -> Seen:
        return see(images, Eyes(), tmp_path)  # type: ignore[arg-type]

    train, held_out, new = look(noise(300, 0)), look(noise(100, 1)), look(noise(100, 2))
    copies = look(train.images.choose(range(0, 200, 2)))
    found, pairs = memorisation.memorised(None, train, held_out, None, copies)
    assert all(figures["memorised"] for figures in found.values())
    assert all(figures["median distance"] == 0 for figures in found.values())
    assert pairs.keys() == {"features", "pixels"}
    found, _ = memorisation.memorised(None, train, held_out, None, new)
    assert not any(figures["memorised"] for figures in found.values())


def test_codes_are_compared_by_the_share_that_differs() -> None:
    codes = torch.randint(0, 512, (40, 4, 4), generator=torch.Generator().manual_seed(0))
    changed = codes[[7, 3]].clone()
    changed[0, 0, :2] += 1
    distances, places = hamming(changed, codes)
    assert distances[:, 0].tolist() == [2 / 16, 0]
    assert places[:, 0].tolist() == [7, 3]
    assert closeness(codes, None, changed, hamming)["median distance"] < 0.2


def test_rejection_keeps_the_likeliest_of_each_class_and_always_as_many() -> None:
    torch.manual_seed(0)
    labels = torch.arange(600) % 2
    good = torch.rand(600)
    features = torch.randn(600, 3) * (2 - good[:, None])
    own = torch.stack([good, 1 - good], dim=1)
    seen = [features, torch.where(labels[:, None] == 0, own, own.flip(1)), labels]
    images = noise(600, 0)
    samples = Seen(images, Moments.of(features), range(600), *seen)
    real = torch.randn(300, 3)
    rows = rejection(Seen(images, Moments.of(real), range(300), real, None, None), samples)
    assert [row["count"] for row in rows] == [120] * 5
    assert rows[-1]["precision"] > rows[0]["precision"]


FOUND: dict[str, Any] = {
    "given": False,
    "guided": True,
    "extractor": {"distance_name": "FD (x)"},
    "decides": "held-out images",
    "against": {
        "held-out images": {
            "samples": {
                "distance": 12.3,
                "count": 1000,
                "precision": [0.7, 0, 1],
                "recall": [0.75, 0, 1],
                "density": [0.8, 0, 1],
            },
            "reconstructions": {"distance": 4.5, "precision": [0.8, 0, 1], "recall": [0.8, 0, 1]},
            "real": {
                "distance": 1.1,
                "precision": [0.9, 0, 1],
                "recall": [0.9, 0, 1],
                "density": [1.0, 0, 1],
            },
        }
    },
    "levels": {
        "all levels sampled": {"distance": 12.3},
        "top real": {"distance": 11},
        "all levels real": {"distance": 4.5},
    },
}


def set_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return found["against"]["held-out images"][name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: None, "The priors lose most, the bottom one of them: train it longer"),
        (lambda f: f.update({"prior gaps": {"bottom": {"training": 3, "held out": 4, "gap": 1}}}),
         "The priors lose most, the bottom one of them: longer training may not help"),
        (lambda f: set_of(f, "reconstructions").update(distance=10),
         "The autoencoder loses most: train it longer"),
        (lambda f: f.pop("levels"), "The priors lose most: train them longer"),
        (lambda f: f.update(few={"bag": 3}), "Too few samples to judge: bag (3)."),
        (lambda f: f.update(memorised={"pixels": {}}), "cannot be said: hold out 20 or more"),
        (lambda f: set_of(f, "samples").update(distance=1.2), "real images by this measure."),
        (lambda f: set_of(f, "samples").update(distance=1.2, count=100),
         "can hardly be told from real images by this measure, which is coarse for 100 images."),
        (lambda f: set_of(f, "samples").update(precision=[0.3, 0, 1]),
         "too many are wrong. A lower --temperature, or a --guidance-scale above 1, may help;"),
        (lambda f: (set_of(f, "samples").update(precision=[0.3, 0, 1]), f.update(guided=False)),
         "too many are wrong. A lower --temperature may help;"),
        (lambda f: set_of(f, "samples").update(recall=[0.3, 0, 1]), "variety is missing"),
        (lambda f: f.update(memorised={"pixels": {"memorised": True, "closer": 0.5,
         "expected": 0.05}}), "Memorised: 50% of the samples are as close"),
        (lambda f: set_of(f, "samples").update(precision=[1.0, 0, 1], density=[0.2, 0, 1]),
         "yet few real images stand close to them (see density): too many are wrong."),
        (lambda f: (f.update(memorised={"pixels": {"memorised": True, "closer": 0.5,
         "expected": 0.05}}), set_of(f, "samples").update(density=[0.2, 0, 1])),
         "cannot be said: samples do not look like real images yet"),
        (lambda f: f.update(sweep=[
            {"temperature": "1.0", "top_p": 1.0, "guidance_scale": 1.0, "distance": 12,
             "count": 9},
            {"temperature": "0.9", "top_p": 1.0, "guidance_scale": 2.0, "distance": 10,
             "count": 9}]),
         "sample with --temperature 0.9 --guidance-scale 2.0"),
        (lambda f: f.update(sweep=[
            {"temperature": "1.0", "top_p": 1.0, "guidance_scale": 1.0, "distance": 9, "count": 9},
            {"temperature": "1.0 0.8", "top_p": 1.0, "guidance_scale": 1.0, "distance": 7,
             "count": 9}]),
         "sample with --temperature 1.0 0.8."),
    ],
)  # fmt: skip
def test_the_summary_says_who_loses_and_what_to_do(
    change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    found = copy.deepcopy(FOUND)
    change(found)
    lines = report.summary(found)
    assert any(sentence in line for line in lines), lines
    assert not re.search(r"\bnan\b|None", " ".join(lines))


def test_no_part_of_ours_is_blamed_for_images_of_another_model() -> None:
    found = copy.deepcopy(FOUND) | {"given": True}
    set_of(found, "samples").update(precision=[0.3, 0, 1])
    text = " ".join(report.summary(found))
    assert "too many are wrong." in text
    assert not re.search("lose|train it|--|priors", text)


def test_evaluations_of_other_counts_are_compared_at_infinity(tmp_path: Path) -> None:
    for name, count, limit in (("a<b", 20, 1.0), ("c", 30, 2.0)):
        row = {"count": count, "distance": 10 / count, "distance at infinity": [limit, 0.1]}
        extractor = {"distance_name": "FD (x)", "kernel_distance_name": "KD (x)"}
        kind = "samples" if name == "c" else "reconstructions"
        found = {"extractor": extractor, "decides": "x", "against": {"x": {kind: row}}}
        path = tmp_path / name / "report" / "figures.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**found, "summary": []}))
    text = report.compare([tmp_path / "a<b", tmp_path / "c"], str(tmp_path))
    assert "a<b has the lowest FD (x) at infinity." in text
    assert "1 ± 0.1" in text
    assert "Samples stand beside reconstructions" in text
    assert "a<b" not in (tmp_path / "comparison.html").read_text()
