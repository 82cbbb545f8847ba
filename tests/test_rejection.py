"""Classifier rejection sampling: the best candidates of each class are kept, and recorded."""

import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines import VQVAE2Pipeline
from pipelines.config import SampleConfig
from pipelines.evaluation.classifier import TRANSFORMATIONS, Classifier, ClassifierConfig
from pipelines.rejection import best, load_judge, with_rejection
from tests.conftest import command as run_here
from vqvae2.common.errors import UserError
from vqvae2.common.runs import RunRecord, read_record

DATA = Path(__file__).parent / "data"
CLASSES = ("dress", "bag", "coat")  # in another order than the pipeline's


class Brightness(nn.Module):
    """The brighter an image, the likelier the first class, and the less likely the others."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=[1, 2, 3])
        return torch.stack([mean, -mean, -mean], dim=1)


def save_script(path: Path, network: nn.Module | None = None) -> Path:
    torch.jit.save(torch.jit.script(network or Brightness()), path)
    return path


def save_classifier(folder: Path, names: tuple[str, ...] = CLASSES, **options: object) -> Path:
    torch.manual_seed(0)
    settings = {"size": (16, 16), "channels": 1, "of_labels": True, **options}
    Classifier(ClassifierConfig(class_names=names, **settings)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sums_of(folder: Path) -> list[int]:
    """How bright each image is, to the last bit."""
    images = [Image.open(path) for path in sorted((folder / "images").iterdir())]
    return [sum(image.tobytes()) for image in images]


def kept_of(folder: Path) -> list[int]:
    return [*map(int, read_record(folder / "sample_config.yaml")["kept"].split())]


def test_each_class_keeps_its_best_share_of_its_own_candidates() -> None:
    turn = [2, 0, 2]  # three of four images have label 2: the best of 8, and the best of 3
    scores = [-abs(i - 5.6) for i in range(15)]
    scores[0], scores[12] = 9.0, 9.0  # 12 is the ninth of its label
    assert best(scores, turn, 4, 0.4) == [0, 7, 5, 6]  # labels in turn
    assert best([1.0] * 15, turn, 4, 0.4) == [0, 1, 2, 3]
    assert best([*range(10)], [0], 3, 0.3) == [7, 8, 9]


def test_a_sample_is_judged_by_its_own_class(run: Path, tmp_path: Path) -> None:
    """Without one, by the likeliest; by a classifier of transformations, by whether it is clear."""
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    _, columns = load_judge(str(save_classifier(tmp_path / "a")), pipeline)
    assert [CLASSES[column] for column in columns[:3]] == ["bag", "coat", "dress"]
    assert columns[3] == -1
    other = save_classifier(tmp_path / "b", TRANSFORMATIONS, of_labels=False)
    assert load_judge(str(other), pipeline)[1] == [0, 0, 0, 0]
    assert load_judge(str(save_script(tmp_path / "c.pt")), pipeline)[1] == [0, 1, 2, -1]


def test_the_best_are_kept_and_drawn_again_without_the_classifier(
    run: Path, tmp_path: Path
) -> None:
    """Made larger, continued, and drawn again from the record alone."""
    script, out = save_script(tmp_path / "bright.pt"), tmp_path / "out"
    sample = ("sample", "--pipeline", run / "pipeline", "--labels", "bag", "--lanes", 4)
    reject = (*sample, "--reject", script, "--keep", 0.25, "--output-dir")
    run_here(*reject, out, "--num-images", 3)
    sums = sums_of(out / "candidates")
    kept = kept_of(out)
    assert (len(sums), len(kept)) == (12, 3)
    assert sorted(sums[i] for i in kept) == sorted(sums)[-3:]  # of equals, either may be kept

    # A larger set chooses anew among more, and among those that are there.
    made = (out / "candidates/images/000003.png").stat().st_mtime_ns
    run_here(*reject, out, "--num-images", 4, "--npz")
    kept = kept_of(out)
    assert names_in(out / "images") == [f"{i:06d}.png" for i in kept]
    assert len(names_in(out / "candidates" / "images")) == 16
    assert (out / "candidates/images/000003.png").stat().st_mtime_ns == made
    whole = {name: (out / "images" / name).read_bytes() for name in names_in(out / "images")}

    # The record is enough: here, where images are missing, and in another folder.
    script.rename(tmp_path / "elsewhere")
    shutil.rmtree(out / "candidates")
    (out / "images" / f"{kept[0]:06d}.png").unlink()
    run_here(*reject, out, "--num-images", 4)
    again = (*sample, "--reject", out, "--num-images", 4)
    run_here(*again, "--output-dir", tmp_path / "again")
    for folder in (out, tmp_path / "again"):
        images = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
        assert images == whole
        assert kept_of(folder) == kept
    for wrong in (("--seed", 1), ("--num-images", 5)):
        run_here(*again, *wrong, "--output-dir", tmp_path / "wrong", code=2)


def test_samples_that_no_classifier_chose_hold_no_choice(tmp_path: Path) -> None:
    config = SampleConfig(pipeline="x", reject=str(tmp_path), output_dir=str(tmp_path / "out"))
    run = RunRecord("sample", config, "sample_config.yaml", facts={})
    run.write(tmp_path)
    with pytest.raises(UserError, match="holds no choice: give a classifier"):
        with_rejection(config, run, mock.Mock())


def test_an_onnx_file_judges_as_the_same_network_in_torchscript(run: Path, tmp_path: Path) -> None:
    """tests/data/brightness.onnx is `Brightness`, as a graph of ReduceMean, Neg and Concat."""
    words = ("sample", "--pipeline", run / "pipeline", "--num-images", 4, "--keep", 0.25)
    judges = {"onnx": DATA / "brightness.onnx", "script": save_script(tmp_path / "bright.pt")}
    for name, judge in judges.items():
        run_here(*words, "--reject", judge, "--output-dir", tmp_path / name)
    sums = [sums_of(tmp_path / name) for name in judges]
    assert sorted(sums[0]) == sorted(sums[1])  # of two that are equally bright, either may be kept


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("onnx", r"judge\.onnx cannot be read as ONNX"),
        ("onnx of bytes", r"the classifier fails on images of shape \(3, 1, 16, 16\)"),
        ("names", "knows dress, bag, hat, but not coat"),
        ("size", r"the images' shape is \(1, 28, 28\), but must be \(1, 16, 16\)"),
        ("text", "cannot be read as TorchScript"),
        ("script", r"output is \(3, 2\), but must be \(3, 3\)"),
        ("nothing", "is no classifier's folder"),
        ("keep", "keep is 2.0, but must be from 0.001 to 1"),
        ("number", "num_images is 400001, but must be at most 400,000 with reject"),
    ],
)
def test_a_classifier_that_does_not_fit_is_one_sentence(
    what: str, sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, keep, number = tmp_path / "judge", 1, 3
    if what == "names":
        save_classifier(path, ("dress", "bag", "hat"))
    elif what == "size":
        save_classifier(path, size=(28, 28))
    elif what == "onnx":
        path = tmp_path / "judge.onnx"
        path.write_text("no network")
    elif what == "onnx of bytes":
        path = DATA / "channel_means.onnx"
    elif what == "text":
        path.write_text("no network")
    elif what == "script":
        save_script(path, nn.Sequential(nn.Flatten(), nn.Linear(256, 2)))
    elif what == "keep":
        keep = 2
    elif what == "number":
        number = 400_001
    words = ("sample", "--pipeline", run / "pipeline", "--num-images", number, "--labels", "coat")
    run_here(*words, "--reject", path, "--keep", keep, "--output-dir", tmp_path / "out", code=2)
    assert re.search(sentence, capsys.readouterr().err)
    seen_at_work = what in ("script", "onnx of bytes")  # these say nothing of what they take
    assert seen_at_work or not [*(tmp_path / "out").glob("*.*")]
