"""The commands as users type them: the README's own, and every mistake answered by one sentence."""

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import VQVAE2Pipeline
from pipelines.cli import main
from tests.conftest import ROOT, edit_manifest, two_processes, vqvae2, write_images
from tests.conftest import command as run_here
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json

README = (ROOT / "README.md").read_text()


def staged_commands() -> list[str]:
    """The README's staged commands, one line each."""
    block = next(
        block
        for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
        if "vqvae2 extract" in block
    )
    return [
        line.split(" #")[0]
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("vqvae2 ")
    ]


def test_the_readmes_commands_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in order on a tiny recipe: the same lines, with `--config tiny` where something is trained."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 60)
    commands = staged_commands()
    assert [line.split()[1] for line in commands] == [
        "train",
        "extract",
        "train-prior",
        "train-prior",
        "reconstruct",
        "sample",
        "assemble",
    ]
    for line in commands:
        words = line.split()[1:]
        run_here(*words, *(("--config", "tiny") if words[0] in ("train", "train-prior") else ()))
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_the_run_folder_holds_what_the_design_says(run: Path) -> None:
    for name in ("vqvae", "prior_0", "prior_1"):
        found = {path.name for path in (run / name).iterdir()}
        assert found == {
            "config.json",
            "model.safetensors",
            "train_config.yaml",
            "metrics.jsonl",
            "curves.png",
            "checkpoints",
        } | ({"images"} if name else set())
        assert [p.name for p in sorted((run / name / "checkpoints").iterdir())] == [
            "step_00000008",
            "step_00000012",
        ]
        with Image.open(run / name / "images" / "step_00000012.png") as picture:
            assert picture.width > 100
    assert {p.name for p in (run / "codes").iterdir()} == {
        "manifest.json",
        "train",
        "validation",
        "extract_config.yaml",
    }
    assert {p.name for p in (run / "pipeline").iterdir()} == {
        "model_index.json",
        "vqvae",
        "prior_0",
        "prior_1",
    }
    pickles = [p for p in run.rglob("*") if p.suffix in (".pkl", ".bin", ".pt")]
    assert all("checkpoints" in p.parts for p in pickles)


def test_samples_and_labels(run: Path, tmp_path: Path) -> None:
    run_here("sample", "--pipeline", run / "pipeline", "--num-images", 5, "--labels", "dress", "0", "--temperature", "1.0", "0.9",
           "--top-k", 8, "--top-p", "0.9", "1.0", "--output-dir", tmp_path / "a")  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        *(f"{i:06d}.png" for i in range(5)),
        "sample_config.yaml",
        "samples.png",
    ]
    parts = ("--vqvae", run / "vqvae", "--priors", run / "prior_0", run / "prior_1")
    run_here("sample", *parts, "--num-images", 5, "--labels", "2", "bag", "--temperature", "1.0", "0.9",
           "--top-k", 8, "--top-p", "0.9", "1.0", "--output-dir", tmp_path / "b")  # fmt: skip
    for path in (tmp_path / "a").glob(
        "*.png"
    ):  # names or numbers, folder or parts: the same images
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    whole = pipeline(6, seed=3, output_type="pt")
    assert tuple(whole.images.shape) == (6, 1, 16, 16)
    assert not (pipeline(6, seed=4).codes[1] == whole.codes[1]).all()


def test_priors_of_both_families_in_one_pipeline(run: Path, tmp_path: Path) -> None:
    for level, name in enumerate(("top", "bottom")):
        run_here(
            "train-prior",
            "--config",
            "tiny",
            "--family",
            "pixelsnail",
            "--codes",
            run / "codes",
            "--level",
            name,
            "--output-dir",
            tmp_path / f"p{level}",
        )
        assert read_json(tmp_path / f"p{level}" / "config.json")["architecture"] == "PixelSNAIL"
    for priors in ((tmp_path / "p0", tmp_path / "p1"), (tmp_path / "p0", run / "prior_1")):
        pipeline = VQVAE2Pipeline.from_parts(run / "vqvae", priors)
        pipeline.save_pretrained(tmp_path / "pipeline")
        images = VQVAE2Pipeline.from_pretrained(tmp_path / "pipeline")(4, output_type="pt").images
        assert (images == pipeline(4, output_type="pt").images).all()


def test_two_processes_sample_the_images_of_one(run: Path, tmp_path: Path) -> None:
    command = ("--pipeline", run / "pipeline", "--num-images", 7, "--lanes", 2, "--output-dir")
    run_here("sample", *command, tmp_path / "one")
    two_processes(ROOT / "scripts" / "sample.py", *command, tmp_path / "two")
    assert len(list((tmp_path / "one").iterdir())) == 9
    for path in (tmp_path / "one").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_pipeline_survives_a_round_trip(run: Path, tmp_path: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline").to("cpu")
    pipeline.save_pretrained(tmp_path)
    again = VQVAE2Pipeline.from_pretrained(tmp_path)
    assert [image.tobytes() for image in again(3).images] == [
        image.tobytes() for image in pipeline(3).images
    ]


def test_parts_that_do_not_belong_together_are_refused(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    other = tmp_path / "vqvae"
    run_here("train", "--config", "tiny", "--seed", 1, "--data.path", photos, "--output-dir", other)
    ours = read_json(run / "codes" / "manifest.json")["encoder_hash"][:12]
    with pytest.raises(UserError, match=f"level 0 was trained on codes of the encoder {ours}"):
        VQVAE2Pipeline.from_parts(other, [run / "prior_0", run / "prior_1"])
    for priors in ([run / "prior_0"], [run / "prior_1", run / "prior_0"], [run / "prior_0"] * 2):
        with pytest.raises(UserError, match="one per level, the top first"):
            VQVAE2Pipeline.from_parts(run / "vqvae", priors)
    drawn = vqvae2(
        "train-prior",
        "--config",
        "tiny",
        "--codes",
        run / "codes",
        "--level",
        "top",
        "--vqvae",
        other,
        "--output-dir",
        tmp_path / "p",
        check=False,
    )
    assert drawn.returncode == 2
    assert ours in drawn.stderr
    assert not (tmp_path / "p").exists()


def test_mistakes_get_one_sentence_and_exit_code_2(
    copy_of_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, out = copy_of_run, tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "bag" / "x.jpg").write_text("no image")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("precious")
    other_codes = shutil.copytree(x / "codes", tmp_path / "other_codes")
    edit_manifest(other_codes, encoder_hash="f" * 64)
    cut_codes = shutil.copytree(x / "codes", tmp_path / "cut_codes")
    shard = cut_codes / "train" / "00000.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 5), shard)
    samples = tmp_path / "samples"
    run_here("sample", "--pipeline", x / "pipeline", "--num-images", 1, "--output-dir", samples)
    train = ("train", "--config", "tiny")
    parts = ("--vqvae", x / "vqvae", "--priors", x / "prior_0", x / "prior_1")
    cases: list[tuple[list[object], list[str]]] = [
        (["trian"], ["unknown subcommand 'trian'", "'train'"]),
        ([*train, "--data.path", empty, "--output-dir", out], [str(empty), "holds no image"]),
        (
            [*train, "--data.path", broken, "--output-dir", out],
            ["bag/x.jpg", "repair or remove it"],
        ),
        (
            [*train, "--data.path", tmp_path / "nowhere", "--output-dir", out],
            ["nowhere", "does not exist"],
        ),
        (
            [*train, "--data.path", photos, "--output-dir", out, "--model.image.size", 30],
            ["image.size", "30", "divisible by 8"],
        ),
        (
            [*train, "--data.path", photos, "--output-dir", out, "--batch-sise", 3],
            ["--batch-sise", "--batch-size"],
        ),
        (
            [*train, "--data.path", photos, "--output-dir", out, "--batch-size", "many"],
            ["--batch-size", "many"],
        ),
        (
            [*train, "--data.path", photos, "--output-dir", out, "--batch-size", 0],
            ["batch_size is 0", "at least 1"],
        ),
        ([*train, "--data.path", photos], ["--output-dir"]),
        (
            [*train, "--data.path", photos, "--output-dir", out, "--mixed-precision", "fp16"],
            ["fp16", "CUDA"],
        ),
        (
            [
                *train,
                "--data.path",
                photos,
                "--output-dir",
                out,
                "--batch-size",
                10,
                "--gradient-accumulation-steps",
                4,
            ],
            ["batch_size is 10", "4"],
        ),
        ([*train, "--data.path", photos, "--output-dir", full], [str(full), "not empty"]),
        (
            [*train, "--data.path", photos, "--output-dir", x / "vqvae", "--batch-size", 32],
            ["batch_size = 16", "32"],
        ),
        (
            [*train, "--data.path", photos, "--output-dir", x / "prior_0"],
            ["'train-prior'", "'train'"],
        ),
        (
            ["train", "--config", "tinny", "--data.path", photos, "--output-dir", out],
            ["no recipe 'tinny'", "tiny"],
        ),
        (
            [
                "extract",
                "--vqvae",
                x / "vqvae",
                "--data.path",
                photos,
                "--data.validation-path",
                photos,
                "--output-dir",
                out,
            ],
            ["trained with None"],
        ),
        (
            ["sample", "--pipeline", x / "pipeline", "--seed", 1, "--output-dir", samples],
            ["seed = 0", "1"],
        ),
        (
            ["extract", "--vqvae", empty, "--data.path", photos, "--output-dir", out],
            ["config.json", "does not exist"],
        ),
        (
            [
                "extract",
                "--vqvae",
                "runs/nowhere/vqvae",
                "--data.path",
                photos,
                "--output-dir",
                out,
            ],
            ["runs/nowhere/vqvae is not a folder"],
        ),
        (
            ["train-prior", "--codes", empty, "--level", "top", "--output-dir", out],
            ["no manifest.json", "vqvae2 extract"],
        ),
        (
            ["train-prior", "--codes", x / "codes", "--level", "2", "--output-dir", out],
            ["level is '2'", "from 0 to 1"],
        ),
        (
            ["train-prior", "--codes", cut_codes, "--level", "top", "--output-dir", out],
            ["00000.parquet was changed", "SHA-256", "manifest says"],
        ),
        (
            [
                "train-prior",
                "--config",
                "tiny",
                "--codes",
                other_codes,
                "--level",
                "top",
                "--output-dir",
                x / "prior_0",
            ],
            ["encoder_hash", "f" * 64],
        ),
        (
            ["sample", *parts, "--labels", "hat", "--output-dir", out],
            ["label 'hat'", "from 0 to 2", "bag"],
        ),
        (["sample", *parts, "--labels", "3", "--output-dir", out], ["label '3'", "from 0 to 2"]),
        (
            ["sample", *parts, "--temperature", "1", "1", "1", "--output-dir", out],
            ["temperature has 3 values", "2 levels"],
        ),
        (["sample", *parts, "--top-p", "2", "--output-dir", out], ["top_p is 2.0", "(0, 1]"]),
        (["sample", *parts, "--seed", "-1", "--output-dir", out], ["seed", "-1", "0 or more"]),
        (
            ["sample", *parts, "--num-images", "0", "--output-dir", out],
            ["num_images", "0", "at least 1"],
        ),
        (
            ["assemble", *parts, "--output-dir", full / "thesis.txt"],
            ["thesis.txt", "must be a folder"],
        ),
        (["demo", "--output-dir", full], [str(full), "not empty"]),
        (["sample", "--vqvae", x / "vqvae", "--output-dir", out], ["--priors"]),
        (
            ["sample", "--pipeline", x / "codes", "--output-dir", out],
            ["model_index.json", "does not exist"],
        ),
        (
            ["reconstruct", "--vqvae", x / "vqvae", empty, "--output-dir", out],
            [str(empty), "holds no image"],
        ),
        (["assemble", *parts, "--output-dir", full], [str(full), "not empty"]),
    ]
    for arguments, words in cases:
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().err
        sentence = next(
            line for line in reversed(said.splitlines()) if line.startswith("vqvae2: error: ")
        )
        assert code == 2, arguments
        assert "Traceback" not in said
        for word in words:
            assert word in sentence, (arguments, sentence)
        assert not out.exists(), arguments
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]
