"""Who was made of what: every part that does not belong to the others is refused by a sentence that names both sides, and a pipeline can be retraced."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pipelines import VQVAE2Pipeline
from prior import load_prior
from prior.manifest import read_manifest
from tests.conftest import command, edit_shard
from vqvae2 import VQVAE2
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    command(*arguments, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def other_preprocessing(run: Path, folder: Path) -> str:
    """The same weights that are fed other images; their hash."""
    model = VQVAE2.from_pretrained(run / "vqvae")
    model.config = dataclasses.replace(
        model.config, image=dataclasses.replace(model.config.image, fit="stretch")
    )
    model.save_pretrained(folder)
    return model.content_hash()


def test_other_preprocessing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = other_preprocessing(run, tmp_path / "vqvae")
    ours = read_manifest(run / "codes").encoder_hash
    assert other != ours
    priors = ("--priors", run / "prior_0", run / "prior_1")
    said = refused(
        capsys,
        "assemble",
        "--vqvae",
        tmp_path / "vqvae",
        *priors,
        "--output-dir",
        tmp_path / "pipeline",
    )
    assert (
        f"trained on codes of the encoder {ours[:12]}, but the autoencoder is {other[:12]}" in said
    )
    said = refused(
        capsys,
        "codes",
        "view",
        "--codes",
        run / "codes",
        "--vqvae",
        tmp_path / "vqvae",
        "--output-dir",
        tmp_path / "x",
    )
    assert f"holds codes of the encoder {ours[:12]}, but the autoencoder is {other[:12]}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"vqvae"}


def test_an_extraction_does_not_go_on_with_another_encoder(
    copy_of_run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = read_manifest(copy_of_run / "codes").encoder_hash
    other = other_preprocessing(copy_of_run, copy_of_run / "other")
    said = refused(
        capsys,
        "extract",
        "--vqvae",
        copy_of_run / "other",
        "--data.path",
        photos,
        "--output-dir",
        copy_of_run / "codes",
    )
    assert ours in said
    assert other in said


def test_a_prior_of_another_dataset(
    copy_of_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same encoder's codes of other images: neither a part of this pipeline, nor what the prior's training goes on with."""
    before = read_manifest(copy_of_run / "codes").codes_hash
    shutil.copytree(copy_of_run / "codes", copy_of_run / "others")
    edit_shard(
        copy_of_run / "others" / "train" / "00000.parquet",
        lambda c: [column.pop() for column in c.values()],
    )
    after = read_manifest(copy_of_run / "others").codes_hash
    train = (
        "train-prior",
        "--config",
        "tiny",
        "--codes",
        copy_of_run / "others",
        "--level",
        "bottom",
        "--output-dir",
    )
    said = refused(capsys, *train, copy_of_run / "prior_1")
    assert f"codes_hash = {before!r}, but this command says {after!r}" in said
    command(*train, copy_of_run / "other_1", "--num-steps", 2)
    parts = (
        "--vqvae",
        copy_of_run / "vqvae",
        "--priors",
        copy_of_run / "prior_0",
        copy_of_run / "other_1",
    )
    capsys.readouterr()
    said = refused(capsys, "sample", *parts, "--output-dir", tmp_path / "samples")
    assert (
        f"the prior of level 1 was trained on the code dataset {after[:12]}, but that of level 0 on {before[:12]}"
        in said
    )


def test_swapped_levels_are_named(run: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"the priors are of the levels \[1, 0\], but the autoencoder needs \[0, 1\]",
    ):
        VQVAE2Pipeline.from_parts(run / "vqvae", [run / "prior_1", run / "prior_0"])


def test_a_stranger_can_retrace_a_pipeline(run: Path, photos: Path, tmp_path: Path) -> None:
    """What was trained on what, by which command and which versions; also after it was loaded and saved again."""
    VQVAE2Pipeline.from_pretrained(run / "pipeline").save_pretrained(tmp_path)
    manifest = read_manifest(run / "codes")
    for index in (
        read_json(run / "pipeline" / "model_index.json"),
        read_json(tmp_path / "model_index.json"),
    ):
        assert (
            index["encoder_hash"]
            == VQVAE2.from_pretrained(run / "vqvae").content_hash()
            == manifest.encoder_hash
        )
        assert (
            index["codes_hash"]
            == manifest.codes_hash
            == load_prior(run / "prior_1").config.codes_hash
        )
        assert {"vqvae_hash", "prior_0_hash", "prior_1_hash", "command_line"} < index.keys()
        assert {"python", "torch", "vqvae2", "pyarrow"} < index["versions"].keys()
        trainings = index["trainings"]
        assert list(trainings) == ["vqvae", "prior_0", "prior_1"]
        assert (
            trainings["vqvae"]["data"]["path"]
            == str(photos)
            == trainings["prior_1"]["codes_source"]
        )
        assert all("torch" in record["versions"] for record in trainings.values())
        assert all("--output-dir" in record["command_line"] for record in trainings.values())
        assert trainings["prior_1"]["codes_hash"] == manifest.codes_hash
        assert trainings["prior_0"]["level"] == "top"


def test_what_is_wrong_with_a_dataset_is_said(
    copy_of_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = copy_of_run / "codes"
    command("codes", "verify", "--codes", codes)
    assert "all 150 rows in 2 shard(s) are what the manifest says" in capsys.readouterr().out
    shard, manifest = (
        codes / "train" / "00000.parquet",
        json.loads((codes / "manifest.json").read_text()),
    )

    edit_shard(
        shard,
        lambda c: (
            c["id"].__setitem__(5, c["id"][4]),
            c["codes_0"][3].__setitem__(0, 16),
            c["label"].__setitem__(0, 3),
        ),
    )
    shutil.copy(shard, codes / "train" / "00001.parquet")
    held_out = codes / "validation" / "00000.parquet"
    held_out.write_bytes(held_out.read_bytes()[:-1])
    command("codes", "verify", "--codes", codes, code=1)
    *lines, empty, last = capsys.readouterr().out.splitlines()
    assert (empty, last) == ("", "5 problem(s).")
    expected = [
        f"{codes / 'train' / '00001.parquet'} is not in the manifest",
        f"{shard}: codes_0 reaches from ",
        f"{shard}: label reaches from 0 to 3, but there are 3 classes",
        f"{shard}: 2 rows, the first of them row 4, have an id and view that another row of the split has",
        f"{held_out} was changed: its SHA-256 is ",
    ]
    assert all(line.startswith(sentence) for line, sentence in zip(lines, expected, strict=True))
    (codes / "manifest.json").write_text(json.dumps(manifest))
    assert "was changed" in refused(capsys, "codes", "info", "--codes", codes)


def test_what_a_dataset_holds_is_said(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(run / "codes")
    command("codes", "info", "--codes", run / "codes")
    said = capsys.readouterr().out
    for words in (
        str(photos),
        f"{manifest.num_train} to train on, {manifest.num_validation} held out",
        "3 (bag, coat, dress)",
        manifest.codes_hash,
    ):
        assert words in said
    assert "bottom, 4 x 4 of 32 codes" in said
    command(
        "codes",
        "view",
        "--codes",
        run / "codes",
        "--vqvae",
        run / "vqvae",
        "--split",
        "validation",
        "--rows",
        0,
        "--output-dir",
        tmp_path / "x",
    )
    assert "validation row 0: " in capsys.readouterr().out
    beyond = refused(
        capsys,
        "codes",
        "view",
        "--codes",
        run / "codes",
        "--vqvae",
        run / "vqvae",
        "--rows",
        150,
        "--output-dir",
        tmp_path / "y",
    )
    assert f"rows is 150, but must be from 0 to {manifest.num_train - 1}" in beyond
    assert "needs a second word: codes info, codes view, codes verify" in refused(
        capsys, "codes", "inf"
    )
