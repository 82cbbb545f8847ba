"""Who was made of what: a part that does not belong to the others is refused by a sentence that
names both sides, and a pipeline can be retraced."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import VQVAE2Pipeline
from pipelines.commands import evaluate
from pipelines.commands.doctor import examine
from pipelines.conditions import as_vectors
from pipelines.evaluation import classifier
from prior import TrainPriorConfig, load_prior
from prior.manifest import read_manifest
from prior.registry import make_prior
from prior.training import prior_config
from tests.conftest import command, edit_shard
from vqvae2 import VQVAE2
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.config import ImagesConfig, PrepareConfig
from vqvae2.data.prepared import prepare_command


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence with which a command is refused."""
    capsys.readouterr()
    command(*arguments, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def other_preprocessing(run: Path, folder: Path) -> str:
    """The same weights that are fed other images; their hash."""
    model = VQVAE2.from_pretrained(run / "vqvae")
    image = dataclasses.replace(model.config.image, fit="stretch")
    model.config = dataclasses.replace(model.config, image=image)
    model.save_pretrained(folder)
    return model.content_hash()


def test_an_encoder_of_other_preprocessing_is_another_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_preprocessing(run, tmp_path / "vqvae")
    ours = read_manifest(run / "codes").encoder_hash
    assert other != ours
    encoder = ("--vqvae", tmp_path / "vqvae", "--output-dir", tmp_path / "x")
    assemble = ("assemble", "--priors", run / "prior_0", run / "prior_1")
    view = ("codes", "view", "--codes", run / "codes")
    for arguments in (assemble, view):
        sentence = refused(capsys, *arguments, *encoder)
        assert ours[:12] in sentence
        assert other[:12] in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["vqvae"]


def test_an_extraction_does_not_go_on_with_another_encoder(
    copy_of_run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = copy_of_run
    ours, other = read_manifest(x / "codes").encoder_hash, other_preprocessing(x, x / "other")
    extract = ("extract", "--vqvae", x / "other", "--data.path", photos)
    sentence = refused(capsys, *extract, "--output-dir", x / "codes")
    assert "holds a run of another autoencoder" in sentence
    assert ours[:12] in sentence
    assert other[:12] in sentence


def test_a_prior_of_another_dataset_is_no_part_and_is_not_trained_on(
    copy_of_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same encoder's codes of other images."""
    x = copy_of_run
    before = read_manifest(x / "codes").codes_hash
    shutil.copytree(x / "codes", x / "others")
    shard = x / "others" / "train" / "00000.parquet"
    edit_shard(shard, lambda columns: [column.pop() for column in columns.values()])
    after = read_manifest(x / "others").codes_hash
    train = ("train-prior", "--config", "tiny", "--codes", x / "others", "--level", "bottom")
    sentence = refused(capsys, *train, "--output-dir", x / "prior_1")
    assert f"holds a run of other codes (codes_hash {before[:12]}, here {after[:12]})" in sentence
    command(*train, "--output-dir", x / "other_1", "--num-steps", 2)
    parts = ("--vqvae", x / "vqvae", "--priors", x / "prior_0", x / "other_1")
    sentence = refused(capsys, "sample", *parts, "--output-dir", tmp_path / "samples")
    assert "the prior of level 1" in sentence
    assert after[:12] in sentence
    assert before[:12] in sentence


def test_swapped_levels_are_named(run: Path) -> None:
    found = r"the priors are of the levels \[1, 0\], but the autoencoder needs \[0, 1\]"
    with pytest.raises(UserError, match=found):
        VQVAE2Pipeline.from_parts(run / "vqvae", [run / "prior_1", run / "prior_0"])


def test_a_stranger_can_retrace_a_pipeline(run: Path, photos: Path, tmp_path: Path) -> None:
    """What was trained on what, by which command and which versions; also after it was loaded and
    saved again. What is published names no folder of the machine that made it."""
    VQVAE2Pipeline.from_pretrained(run / "pipeline").save_pretrained(tmp_path / "again")
    manifest = read_manifest(run / "codes")
    encoder = VQVAE2.from_pretrained(run / "vqvae").content_hash()
    prior = load_prior(run / "prior_1").config
    for folder in (run / "pipeline", tmp_path / "again"):
        index = read_json(folder / "model_index.json")
        assert index["encoder_hash"] == encoder == manifest.encoder_hash
        assert index["codes_hash"] == manifest.codes_hash == prior.codes_hash
        assert {"vqvae_hash", "prior_0_hash", "prior_1_hash", "command_line"} < index.keys()
        assert {"python", "torch", "vqvae2", "pyarrow"} < index["versions"].keys()
        trainings = index["trainings"]
        assert list(trainings) == ["vqvae", "prior_0", "prior_1"]
        assert trainings["vqvae"]["data"]["path"] == photos.name
        assert trainings["prior_1"]["codes_source"] == photos.name
        for record in trainings.values():
            assert "torch" in record["versions"]
            assert "--output-dir" in record["command_line"]
        assert trainings["prior_1"]["codes_hash"] == manifest.codes_hash
        assert trainings["prior_0"]["level"] == "top"
        assert str(photos.parent.parent) not in json.dumps(index)


def test_what_is_wrong_with_a_dataset_is_listed(
    copy_of_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = copy_of_run / "codes"
    verify = ("codes", "verify", "--codes", codes)
    command(*verify)
    assert "all 150 rows in 2 shard(s) are what the manifest says" in capsys.readouterr().out
    manifest = (codes / "manifest.json").read_text()

    def spoil(columns: dict[str, list]) -> None:
        columns["id"][5] = columns["id"][4]
        columns["codes_0"][3][0] = 16
        columns["label"][0] = 3

    shard, held_out = codes / "train" / "00000.parquet", codes / "validation" / "00000.parquet"
    edit_shard(shard, spoil)
    shutil.copy(shard, codes / "train" / "00001.parquet")
    held_out.write_bytes(held_out.read_bytes()[:-1])
    command(*verify, code=1)
    *lines, empty, last = capsys.readouterr().out.splitlines()
    assert (empty, last) == ("", "5 problem(s).")
    expected = [
        f"{codes / 'train' / '00001.parquet'} is not in the manifest",
        f"{shard}: codes_0 ranges from ",
        f"{shard}: label ranges from 0 to 3, but there are 3 classes",
        f"{shard}: 2 rows, the first of them row 4, have an id and view that another row",
        f"{held_out} was changed: its SHA-256 is ",
    ]
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning)
    (codes / "manifest.json").write_text(manifest)
    assert "was changed" in refused(capsys, "codes", "info", "--codes", codes)


def test_what_a_dataset_holds_is_described(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(run / "codes")
    command("codes", "info", "--codes", run / "codes")
    text = capsys.readouterr().out
    counts = f"{manifest.num_train} to train on, {manifest.num_validation} held out"
    for words in (photos.name, counts, "3 (bag, coat, dress)", manifest.codes_hash):
        assert words in text
    assert "bottom, 4 x 4 of 32 codes" in text
    view = ("codes", "view", "--codes", run / "codes", "--vqvae", run / "vqvae")
    row = ("--split", "validation", "--rows", 0, "--output-dir", tmp_path / "x")
    command(*view, *row)
    assert "validation row 0: " in capsys.readouterr().out
    beyond = refused(capsys, *view, "--rows", 150, "--output-dir", tmp_path / "y")
    assert f"rows is 150, but must be from 0 to {manifest.num_train - 1}" in beyond


def test_loading_a_pipeline_loads_no_compiler(run: Path) -> None:
    """What a configuration asks for is looked at without drawing weights: on PyTorch's meta device
    that would import one, which takes a second."""
    program = """
import sys
from pipelines import VQVAE2Pipeline
VQVAE2Pipeline.from_pretrained(sys.argv[1])
assert not {"torch._dynamo", "sympy"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", program, run / "pipeline"], check=True)


def test_attributes_named_by_numbers_are_names_and_values_are_values() -> None:
    names = ("3", "5", "7")
    for row, expected in (
        ([3, 5, 7], [1, 1, 1]),
        ([7], [0, 0, 1]),
        ([1, 0, 1], [1, 0, 1]),
        ([0.5, 5, 7], [0.5, 5, 7]),
    ):
        vectors = as_vectors([row], 3, names, can_hide=True)
        assert vectors.tolist() == [expected]
    with pytest.raises(UserError, match=r"the shape \(\)"):
        as_vectors(1.0, 3, names, can_hide=True)
    for row in (["3", ["5"]], [{"7": 1}]):
        with pytest.raises(UserError, match="give numbers, or names of attributes"):
            as_vectors([row], 3, names, can_hide=True)


def test_attributes_travel_from_the_data_to_the_images(
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Data with a column of attributes, prepared, and its codes.
    data, codes, index = tmp_path / "photos", tmp_path / "codes", itertools.count()
    shutil.copytree(photos, data)
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    attributes = {name: ["third"] * (i % 3 == 0) + [name[:3]] for i, name in enumerate(names)}
    rows = [{"file_name": name, "x": attributes[name]} for name in names]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    column = ("--data.condition-column", "x")
    image = VQVAE2.from_pretrained(run / "vqvae").config.image
    source = ImagesConfig(path=str(data), condition_column="x")
    prepare_command(PrepareConfig(data=source, image=image, output_dir=str(tmp_path / "prepared")))
    for path, more in ((data, column), (tmp_path / "prepared", ())):
        folder = codes.with_name(f"codes_{next(index)}")
        extract = ("extract", "--vqvae", run / "vqvae", "--data.path", path, *more)
        command(*extract, "--views", "original", "flip", "--output-dir", folder)
        manifest = read_manifest(folder)
        assert manifest.vector_names == ("bag", "coa", "dre", "third")
        table = pq.read_table(next((folder / "train").glob("*.parquet"))).to_pylist()
        for row in table:
            given = [
                name for name, has in zip(manifest.vector_names, row["vector"], strict=True) if has
            ]
            assert given == sorted(attributes[row["id"]])

    # A prior is trained on them, and another made; both are sampled from.
    command("codes", "verify", "--codes", folder)
    train = ("train-prior", "--config", "tiny", "--codes", folder, "--num-steps", 2)
    command(*train, "--level", "top", "--output-dir", tmp_path / "prior_0")
    figures = (tmp_path / "prior_0" / "metrics.jsonl").read_text()
    assert "bits_per_code_without_condition" in figures
    top = load_prior(tmp_path / "prior_0")
    assert top.config.vector_names == manifest.vector_names
    assert not top.config.num_classes
    config = prior_config(TrainPriorConfig(codes=str(folder), level="1", output_dir=""), manifest)
    small = dataclasses.replace(config.network, width=32, num_layers=1)
    torch.manual_seed(1)
    bottom = make_prior(dataclasses.replace(config, network=small))
    with torch.no_grad():  # so little training hardly makes a difference between conditions
        for parameter in bottom.vector.parameters():
            parameter.mul_(100)
    VQVAE2Pipeline(VQVAE2.from_pretrained(run / "vqvae"), [top, bottom]).save_pretrained(
        tmp_path / "pipeline"
    )
    pipeline = ("--pipeline", tmp_path / "pipeline")
    sample = ("sample", *pipeline, "--num-images", 2, "--lanes", 2)
    command(*sample, "--attributes", "third", "coa", "--output-dir", tmp_path / "a")
    np.save(tmp_path / "both.npy", np.array([[0, 1, 0, 1], [np.nan] * 4]))
    command(*sample, "--conditions", tmp_path / "both.npy", "--output-dir", tmp_path / "b")
    (tmp_path / "both.jsonl").write_text('["coa", "third"]\n[1, 0, 0, 0]\n')
    command(*sample, "--conditions", tmp_path / "both.jsonl", "--output-dir", tmp_path / "c")
    first, second = (
        [Image.open(tmp_path / x / f"images/00000{i}.png").tobytes() for x in "abc"] for i in (0, 1)
    )
    assert len(set(first)) == 1  # the same condition, however it is given
    assert len(set(second)) == 3

    # Receipts draw each image and the set again, and name other conditions.
    for x in "abc":
        command("verify", tmp_path / x, *pipeline)
    again = ("sample", *pipeline, "--receipt", tmp_path / "b" / "receipt.json")
    command(*again, "--output-dir", tmp_path / "again")
    drawn, other = (tmp_path / x / "images/000001.png" for x in ("b", "again"))
    assert drawn.read_bytes() == other.read_bytes()
    other = refused(capsys, *again, "--attributes", "coa", "--output-dir", tmp_path / "other")
    assert "other conditions" in other
    assert "no attribute is named 'coat' (did you mean 'coa'?)" in refused(
        capsys, *sample, "--attributes", "coat", "--output-dir", tmp_path / "d"
    )

    # Samples to evaluate take the images' conditions: of others they are not those.
    evaluation = ("evaluate", *pipeline, "--data.path", data, *column)
    monkeypatch.setattr(classifier, "FEWEST_STEPS", 10)
    monkeypatch.setattr(evaluate.Subject, "sample", mock.Mock(side_effect=UserError("enough")))
    command(*evaluation, "--output-dir", tmp_path / "e", code=2)
    assert "enough" in capsys.readouterr().err
    rows[0]["x"] = [*rows[0]["x"], *({"third", "dre"} - {*rows[0]["x"]})]
    kept = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command(*evaluation, "--output-dir", tmp_path / "e", code=2)
    assert "other conditions" in capsys.readouterr().err
    (data / "metadata.jsonl").write_text(kept)

    # The doctor looks at the new input; an image's likelihood and a variation take a condition.
    capsys.readouterr()
    findings = list(examine(priors=[bottom], codes=folder))
    assert {"vector", "vector helps"} <= {name.split(", ")[-1] for name, _, _ in findings}
    loaded = VQVAE2Pipeline.from_pretrained(tmp_path / "pipeline")
    image = str(data / names[0])
    given = loaded.log_likelihood(image, conditions=[["coa"]])
    assert not torch.equal(given, loaded.log_likelihood(image))
    assert loaded.variations(image, num_images=1, conditions=[["coa"]]).codes
