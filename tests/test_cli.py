"""The commands as users type them: the README's own, and every mistake answered by one sentence."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import VQVAE2Pipeline
from pipelines.cli import COMMANDS, RECIPES, flag_names, main, parse, split_command
from pipelines.commands.completion import completion_script
from pipelines.file_names import file_names
from pipelines.next_steps import next_steps
from prior import load_prior
from tests.conftest import ROOT, edit_manifest, vqvae2, write_images
from tests.conftest import command as run_here
from tests.test_rejection import save_classifier
from vqvae2.common.config import read_yaml
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.config import TrainVQVAEConfig
from vqvae2.data import is_held_out

README = (ROOT / "README.md").read_text()
RUN_FILES = {"config.json", "model.safetensors", "train_config.yaml", "metrics.jsonl", "images",
             "curves.png", "checkpoints"}  # fmt: skip


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def staged_commands() -> list[str]:
    """The README's staged commands, one line each."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    block = next(block for block in blocks if "vqvae2 extract" in block)
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0] for line in lines if line.startswith("vqvae2 ")]


def test_the_readmes_commands_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in order on a tiny recipe: the same lines, with `--config tiny` to train."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 60)
    commands = [line.split()[1:] for line in staged_commands()]
    names = [words[0] for words in commands]
    assert names[:4] == ["train", "extract", "train-prior", "train-prior"]
    assert "sample" in names
    for words in commands:
        tiny = ("--config", "tiny") if words[0].startswith("train") else ()
        run_here(*words, *tiny)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


def test_the_run_folder_holds_what_the_design_says(run: Path) -> None:
    for name in ("vqvae", "prior_0", "prior_1"):
        assert names_in(run / name) == RUN_FILES
        assert names_in(run / name / "checkpoints") == {"step_00000008", "step_00000012"}
        with Image.open(run / name / "images" / "step_00000012.png") as picture:
            assert picture.width > 100
    codes = {"manifest.json", "README.md", "train", "validation", "extract_config.yaml"}
    assert names_in(run / "codes") == codes
    assert names_in(run / "pipeline") == {"model_index.json", "vqvae", "prior_0", "prior_1"}
    assert not [p for p in run.rglob("*") if p.suffix in (".pkl", ".bin", ".pt")]


def test_samples_of_names_or_numbers_of_a_folder_or_parts_are_the_same(
    run: Path, tmp_path: Path
) -> None:
    options = (
        *("--num-images", 5, "--temperature", 1.0, 0.9),
        *("--top-k", 8, "--top-p", 0.9, 1.0),
    )
    pipeline = ("--pipeline", run / "pipeline")
    run_here(
        "sample", *pipeline, *options, "--labels", "dress", "0", "--output-dir", tmp_path / "a"
    )
    files = ["samples.png", "receipt.json", *(f"images/{i:06d}.png" for i in range(5))]
    assert names_in(tmp_path / "a") == {*files[:1], "sample_config.yaml", "receipt.json", "images"}
    assert len(names_in(tmp_path / "a" / "images")) == 5  # a metric over them counts no sheet
    parts = ("--vqvae", run / "vqvae", "--priors", run / "prior_0", run / "prior_1")
    run_here("sample", *parts, *options, "--labels", "2", "bag", "--output-dir", tmp_path / "b")
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_priors_of_both_families_in_one_pipeline(run: Path, tmp_path: Path) -> None:
    train = ("train-prior", "--config", "tiny", "--family", "pixelsnail", "--codes", run / "codes")
    for level, name in enumerate(("top", "bottom")):
        run_here(*train, "--level", name, "--output-dir", tmp_path / f"p{level}")
        assert read_json(tmp_path / f"p{level}" / "config.json")["architecture"] == "PixelSNAIL"
    for priors in ((tmp_path / "p0", tmp_path / "p1"), (tmp_path / "p0", run / "prior_1")):
        pipeline = VQVAE2Pipeline.from_parts(run / "vqvae", priors)
        pipeline.save_pretrained(tmp_path / "pipeline")
        images = VQVAE2Pipeline.from_pretrained(tmp_path / "pipeline")(4, output_type="pt").images
        assert (images == pipeline(4, output_type="pt").images).all()


def test_two_processes_sample_the_images_of_one(run: Path, tmp_path: Path) -> None:
    """Launched by the module's name, as from an installed wheel, where there is no scripts/; and
    with the best of twice as many candidates."""
    judge = save_classifier(tmp_path / "judge")
    flags = ("--pipeline", run / "pipeline", "--num-images", 7, "--lanes", 2)
    flags += ("--reject", judge, "--keep", 0.5, "--output-dir")
    run_here("sample", *flags, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    program = [*launcher, "2", "-m", "pipelines.cli", "sample", *map(str, flags), tmp_path / "two"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run(program, check=True, env=environment, cwd=ROOT, capture_output=True)
    assert len(names_in(tmp_path / "one" / "images")) == 7
    assert names_in(tmp_path / "one" / "images") == names_in(tmp_path / "two" / "images")
    for path in [*(tmp_path / "one").rglob("*.png"), *(tmp_path / "one").rglob("receipt.json")]:
        two = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == two.read_bytes()


def test_reconstruct_reads_images_as_every_command_does(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    """A list with a column of another name, and an image that cannot be read."""
    files = sorted(photos.rglob("*.png"))[:3]
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    rows = "\n".join(map(str, [*files, broken]))
    (tmp_path / "list.csv").write_text(f"picture\n{rows}\n")
    data = ("--data.path", tmp_path / "list.csv", "--data.image-column", "picture")
    reconstruct = ("reconstruct", "--vqvae", run / "vqvae", *data, "--output-dir", tmp_path / "out")
    run_here(*reconstruct, "--num-images", 3)
    pictures = (tmp_path / "out" / "images").rglob("*.png")
    assert {path.name for path in pictures} == {path.name for path in files}
    run_here(*reconstruct, "--num-images", 4, code=2)
    written = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")
    }
    run_here(*reconstruct, "--num-images", 4, "--data.on-error", "skip")
    assert "broken" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert written == {path: path.stat().st_mtime_ns for path in written}  # only what is missing

    # Other images are not mixed with these.
    (tmp_path / "list.csv").write_text(f"picture\n{files[1]}\n")
    run_here(*reconstruct, code=2)


def test_reconstruct_keeps_names_and_tells_training_images(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture, a pattern of them and a folder, one of whose files has another's name."""
    bags = sorted((photos / "bag").glob("*.png"))
    mine = shutil.copytree(photos / "bag", tmp_path / "mine" / "a")
    shutil.copy(bags[0], mine / f"{bags[0].stem}.bmp")
    trained = [not is_held_out(f"bag/{path.name}", 0.05) for path in bags]
    first = bags[trained.index(True)]
    for name, path, number, seen in (
        ("one", first, 1, 1),
        ("bags", f"{photos}/b*/*.png", len(bags), sum(trained)),
        ("mine", mine.parent, len(bags) + 1, 0),
    ):
        out = ("--num-images", 0, "--output-dir", tmp_path / "out" / name)
        run_here("reconstruct", "--vqvae", run / "vqvae", "--data.path", path, *out)
        told = f"{seen} of {number}" if seen else "It is not known how many"  # copies
        told = f"\n{told} are images that the model was trained on"
        assert told in capsys.readouterr().out
        assert len([*(tmp_path / "out" / name / "images").rglob("*.png")]) == number
    assert names_in(tmp_path / "out" / "one" / "images") == {first.name}
    assert f"{bags[0].name}.png" in names_in(tmp_path / "out" / "mine" / "images" / "a")


def test_more_images_do_not_change_whose_reconstruction_a_file_is(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    """A list of absolute paths: the folder that holds all of them is not that of the first."""
    first, second, *_ = sorted((photos / "bag").glob("*.png"))
    for path, copy in ((first, "a/1.png"), (second, "1.png")):
        (tmp_path / copy).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / copy)
    (tmp_path / "list.csv").write_text(f"path\n{tmp_path}/a/1.png\n{tmp_path}/1.png\n")
    command = ("reconstruct", "--vqvae", run / "vqvae", "--data.path", tmp_path / "list.csv")
    for folder, number in (("grown", 1), ("grown", 2), ("at once", 2)):
        run_here(*command, "--num-images", number, "--output-dir", tmp_path / folder)
    grown, at_once = tmp_path / "grown" / "images", tmp_path / "at once" / "images"
    for name in ("a/1.png", "1.png"):
        assert (grown / name).read_bytes() == (at_once / name).read_bytes()
    assert (grown / "a/1.png").read_bytes() != (grown / "1.png").read_bytes()


def test_a_training_on_a_pattern_of_files_is_found_again(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data.path", f"{photos}/b*/*.png")
    model = tmp_path / "model"
    run_here("train", "--config", "tiny", *data, "--num-steps", 1, "--output-dir", model)
    run_here("reconstruct", "--vqvae", model, *data, "--output-dir", tmp_path / "out")
    assert "It is not known" not in capsys.readouterr().out


def test_no_two_images_are_reconstructed_to_one_file() -> None:
    names = ["cat/1.jpg", "cat/1.png", "CAT/1.JPG", "/etc/x", "../x", "v1.5/000001", "cat/1.jpg"]
    files = ["cat/1.png", "cat/1.png.png", "CAT/1.JPG.png", "etc/x.png", "x.png"]
    files += ["v1.5/000001.png", "cat/1.jpg-2.png"]
    assert file_names(names, ".png") == files
    assert file_names(["/a/b/1.jpg", "/a/d/../c/1.jpg"], ".tif") == ["b/1.tif", "c/1.tif"]
    long = [f"a/{'é' * 120}{i}.jpg" for i in range(2)]
    made = file_names(long, ".coarse.png")
    assert len({*made}) == 2
    for name in made:
        assert len(name.removeprefix("a/").encode()) <= 255
        assert name.endswith(".coarse.png")


def test_every_command_ends_with_what_comes_next(
    copy_of_run: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever copies the printed lines comes from images to samples, with one recipe."""
    monkeypatch.chdir(copy_of_run.parent.parent)
    shutil.rmtree("runs/x/prior_1")
    todo, done = [f"vqvae2 train --config tiny --data.path {photos} --output-dir runs/x/vqvae"], []
    while todo:
        line = todo.pop(0)
        _, name, *words = shlex.split(line)
        parse(name, words)
        if line not in done and name != "doctor" and "--num-images" not in line:
            run_here(name, *words)
            done.append(line)
            shown = capsys.readouterr().out.partition("Next:\n")[2]
            assert shown, line
            todo += shown.splitlines()
    names = ["train", "inspect", "extract", "train-prior", "assemble", "sample"]
    assert [line.split()[1] for line in done] == names
    assert "--config tiny --codes runs/x/codes --vqvae runs/x/vqvae --level 1" in done[3]
    assert len(names_in(Path("runs/x/samples/images"))) == 20  # as the recipe says


def test_what_comes_next_of_what_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags that were not the default, and folders beside the given one, whatever its name; of a
    model of the Hub, here."""
    monkeypatch.chdir(tmp_path)
    for folder in ("big", "x/my_vqvae", "vqvae", "a/vqvae"):
        Path(folder).mkdir(parents=True)
    for line, expected in (
        (
            "prepare --data.path a --image.size 8 16 --output-dir big/",
            "train --data.path big/ --image.size 8 16 --output-dir big_vqvae",
        ),
        (
            "train --data.path a --data.streaming --data.label-column none --output-dir x/my_vqvae",
            "extract --vqvae x/my_vqvae --data.path a --data.streaming --data.label-column none "
            "--output-dir x/my_codes",
        ),
        (
            "import-weights --checkpoint a.pt --output-dir vqvae",
            "extract --vqvae vqvae --data.path PHOTOS --output-dir codes",
        ),
        (
            "reconstruct --vqvae a/vqvae --data.path b --output-dir out",
            "extract --vqvae a/vqvae --data.path b --output-dir a/codes",
        ),
        (
            "reconstruct --vqvae someone/model --data.path b --output-dir out",
            "extract --vqvae someone/model --data.path b --output-dir model_codes",
        ),
        (
            "sample --pipeline p --compile True --num-images 3 --output-dir out",
            "sample --pipeline p --compile True --num-images 6 --output-dir out",
        ),
    ):
        command, words = split_command(line.split())
        (*_, last) = next_steps(command, parse(command, words))
        assert " ".join(last) == expected
        parse(last[0], last[1:])


@pytest.mark.parametrize(
    ("line", "flag"),
    [("train photos", "--data.path photos"), ("sample x --num-images 3", "--pipeline x"),
     ("codes info x/codes", "--codes x/codes"), ("completion zsh", "--shell zsh")],
)  # fmt: skip
def test_a_word_without_its_flag_is_told_the_flag(line: str, flag: str) -> None:
    command, words = split_command(line.split())
    with pytest.raises(UserError, match=f"no flag in front of it; did you mean {flag}"):
        parse(command, words)
    with pytest.raises(UserError, match="no flag takes b"):
        parse("extract", ["--vqvae", "x", "--data.path", "a", "b", "--output-dir", "c"])
    for second in (["--files", "b"], ["--files=b"]):  # of which one would not be looked at
        with pytest.raises(UserError, match=r"no flag in front .* --files is given too"):
            parse("verify", ["a", "--pipeline", "x", *second])


def test_a_pipeline_survives_a_round_trip(run: Path, tmp_path: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline").to("cpu")
    pipeline.save_pretrained(tmp_path)
    again = VQVAE2Pipeline.from_pretrained(tmp_path)
    images, same = pipeline(3).images, again(3).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in same]


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
    train = ("train-prior", "--config", "tiny", "--codes", run / "codes", "--level", "top")
    result = vqvae2(*train, "--vqvae", other, "--output-dir", tmp_path / "p", check=False)
    assert result.returncode == 2
    assert ours in result.stderr
    assert not (tmp_path / "p").exists()


def test_a_pipeline_is_told_from_its_parts(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data.path", photos, "--output-dir", tmp_path / "x")
    run_here("reconstruct", "--vqvae", run / "pipeline", *words, code=2)
    assert "is a pipeline, but a model was expected: give a part" in capsys.readouterr().err
    run_here("score", "--pipeline", run / "pipeline" / "vqvae", *words, code=2)
    assert "is a model, but a pipeline was expected" in capsys.readouterr().err
    run_here("score", "--pipeline", run, *words, code=2)
    assert f"is the folder of a whole run: give {run}/pipeline" in capsys.readouterr().err


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    run_here("--version")
    assert capsys.readouterr().out == f"vqvae2 {version('vqvae2')}\n"
    run_here()
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in COMMANDS)


def test_quiet_shows_warnings_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assemble = ("assemble", "--vqvae", run / "vqvae", "--priors", run / "prior_0", run / "prior_1")
    run_here(*assemble, "--output-dir", tmp_path / "a", "--quiet")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line[:17] for line in shown.err.splitlines()] == [
        "warning: prior_0:",
        "warning: prior_1:",
    ]
    run_here("--verbose", *assemble, "--output-dir", tmp_path / "b")
    assert "the pipeline" in capsys.readouterr().out
    for command in COMMANDS:
        assert {"--quiet", "--verbose", "--config", "--help"} < {*flag_names(command)}


def test_a_closed_pipe_is_no_error() -> None:
    """As of other programs whose output is read by `head`."""
    program = f"{sys.executable} -m pipelines.cli completion; echo $? >&2"
    shell = subprocess.run(
        ["bash", "-c", f"({program}) | true"], capture_output=True, text=True, check=True
    )
    assert shell.stderr == "141\n"


def test_the_machines_faults_get_a_sentence_and_ours_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        def command(config: object) -> None:
            raise error

        monkeypatch.setattr("pipelines.cli.function_of", lambda name: command)
        run_here("completion", code=2)

    torchs = RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory: 9 bytes")
    for error, words in (
        (OSError(28, "No space left on device"), "No space left"),
        (MemoryError("Unable to allocate 9 TiB"), "this machine ran out of memory"),
        (torchs, "this machine ran out of memory"),
        (UserError("x" * 10**6 + "\nend"), "xxx end"),
        (UserError(os.fsdecode(b"caf\xe9")), "caf"),
    ):
        fail(error)
        text = capsys.readouterr().err
        assert words in text
        assert len(text) < 1000
        assert text.count("\n") == 1
    for wrong in (RuntimeError("sizes differ"), RecursionError(), KeyError("x")):
        with pytest.raises(type(wrong)):
            fail(wrong)


def test_at_most_five_names_are_suggested() -> None:
    with pytest.raises(UserError) as error:
        parse("train", ["--zzz", "3"])
    assert str(error.value).count("--") == 7  # the mistake, five, and --help


def test_the_same_thing_has_the_same_flag_everywhere() -> None:
    """No word that has no flag, `--image.*` for preprocessing and `--data.*` for images."""
    flags = {name: flag_names(name) for name in COMMANDS}
    for name in ("train", "extract", "reconstruct", "inspect", "doctor", "prepare"):
        assert {"--data.path", "--data.validation-path"} < {*flags[name]}, name
    for name in ("train", "prepare", "import-weights"):
        assert "--image.size" in flags[name]
    for name in ("extract", "reconstruct", "inspect", "doctor", "sample", "verify", "assemble"):
        assert "--vqvae" in flags[name]
    assert not any(flag.startswith("--model.image") for flag in flags["train"])
    read = parse("train", ["--image.size", "128", "--data.path", "p", "--output-dir", "o"])
    assert read.model.image.size == (128,)


def test_a_field_for_recipes_only_has_no_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = TrainVQVAEConfig.__dataclass_fields__["weight_decay"]
    monkeypatch.setattr(field, "metadata", {"recipe_only": True})
    from pipelines.cli import _annotate_for_tyro

    _annotate_for_tyro.cache_clear()
    annotations = TrainVQVAEConfig.__annotations__
    monkeypatch.setattr(TrainVQVAEConfig, "__annotations__", dict(annotations))
    (tmp_path / "r.yaml").write_text("train: {weight_decay: 0.5}")
    command = ["--config", str(tmp_path / "r.yaml"), "--data.path", "p", "--output-dir", "o"]
    assert parse("train", command).weight_decay == 0.5
    assert "--weight-decay" not in flag_names("train")
    with pytest.raises(UserError, match="unknown flag --weight-decay"):
        parse("train", [*command, "--weight-decay", "1"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vqvae2 tra", {"train", "train-prior"}),
        ("vqvae2 train --image.s", {"--image.size"}),
        ("vqvae2 codes v", {"view", "verify"}),
        ("vqvae2 codes view --spl", {"--split"}),
        ("vqvae2 plan --config ffhq2", {"ffhq256"}),
        ("vqvae2 train --data.path ph", set()),  # bash completes files
    ],
)
def test_bash_completes(line: str, expected: set[str]) -> None:
    words = line.split()
    ask = (f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _vqvae2; "
           'printf "%s\\n" "${COMPREPLY[@]}"')  # fmt: skip
    script = f"{completion_script('bash')}\n{ask}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == expected


def test_recipes_keep_preprocessing_in_the_model() -> None:
    for path in map(Path, map(str, RECIPES.iterdir())):
        if path.suffix == ".yaml":
            assert "size" in read_yaml(path)["train"]["model"]["image"]


MISTAKES = """
trian -> unknown subcommand 'trian' | 'train'
codes -> codes info, codes view, codes verify
TRAIN --data.path {empty} -> {empty} | holds no image
TRAIN --data.path {broken} -> bag/x.jpg | repair or remove it
TRAIN --data.path nowhere -> nowhere | does not exist
TRAIN --data.path {photos} --image.size 30 -> image.size | 30 | divisible by 8
TRAIN --data.path {photos} --batch-sise 3 -> --batch-sise | --batch-size
TRAIN --data.path {photos} --batch-size many -> --batch-size | many
TRAIN --data.path {photos} --batch-size 0 -> batch_size is 0 | at least 1
TRAIN --data.path {photos} --mixed-precision fp16 -> fp16 | CUDA
TRAIN --data.path {photos} --batch-size 10 --gradient-accumulation-steps 4 -> batch_size is 10 | 4
TRAIN -> --data.path must be given
TRAIN --data.path {photos} stray -> stray
train --config tiny --data.path {photos} -> --output-dir must be given
train --config tiny --data.path {photos} --output-dir {full} -> {full} | not empty
train --config tiny --data.path {photos} --output-dir {x}/vqvae --batch-size 8 -> batch_size = 16
train --config tiny --data.path {photos} --output-dir {x}/prior_0 -> 'train-prior' | 'train'
train --config tinny --data.path {photos} --output-dir {out} -> no recipe 'tinny' | tiny
train --config -> --config has no value
plan -> train-prior | --config RECIPE
EXTRACT --vqvae {x}/vqvae --data.validation-path {photos} -> trained with None
EXTRACT --vqvae {empty} -> config.json | does not exist
EXTRACT --vqvae runs/nowhere/vqvae -> runs/nowhere/vqvae is not a folder
PRIOR --codes {empty} --level top -> not a finished code dataset | vqvae2 extract
PRIOR --codes {x}/codes --level 2 -> level is '2' | from 0 to 1
PRIOR --codes {cut} --level top -> 00000.parquet was changed | SHA-256 | manifest says
train-prior --config tiny --codes {other} --level top --output-dir {x}/prior_0 -> encoder_hash | {f}
sample --pipeline {x}/pipeline --seed 1 --output-dir {samples} -> seed = 0 | 1
SAMPLE {parts} --labels hat -> label 'hat' | from 0 to 2 | bag
SAMPLE {parts} --labels 3 -> label '3' | from 0 to 2
SAMPLE {parts} --temperature 1 1 1 -> temperature has 3 values | number of levels is 2
SAMPLE {parts} --top-p 2 -> top_p is 2.0 | (0, 1]
SAMPLE {parts} --seed -1 -> seed | -1 | 0 or more
SAMPLE {parts} --num-images 0 -> num_images | 0 | at least 1
SAMPLE {parts} --pipeline {x}/pipeline -> --pipeline replaces --vqvae and --priors
SAMPLE --vqvae {x}/vqvae -> --priors
SAMPLE --receipt {samples}/receipt.json --top-k 3 -> --receipt says what --top-k is
verify {samples} --pipeline {x}/codes -> model_index.json | does not exist
verify {empty} --pipeline {x}/pipeline -> {empty} | holds no image
verify --pipeline {x}/pipeline -> --files must be given
verify {samples}/samples.png --pipeline {x}/pipeline -> shows a whole set
score {photos} --pipeline {x}/pipeline --output-dir {out} --labels hat -> label 'hat' | bag
score {photos} --pipeline {x}/pipeline --output-dir {out} --calibrate --maps -> come after it
compress {empty} --pipeline {x}/pipeline --output-dir {out} -> {empty} | holds no image
decompress {samples}/samples.png --pipeline {x}/pipeline --output-dir {out} -> no .vq2 file
decompress {empty} --pipeline {x}/pipeline --output-dir {out} -> holds no .vq2 file
SAMPLE --pipeline {x}/codes -> model_index.json | does not exist
assemble {parts} --output-dir {full}/thesis.txt -> thesis.txt | must be a folder
assemble {parts} --output-dir {full} -> {full} | not empty
demo --output-dir {full} -> {full} | not empty
RECONSTRUCT --data.path {empty} -> {empty} | holds no image
RECONSTRUCT --data.path {photos} --data.streaming -> data.streaming
"""
SHORT = {
    "TRAIN": "train --config tiny --output-dir {out}",
    "EXTRACT": "extract --data.path {photos} --output-dir {out}",
    "PRIOR": "train-prior --output-dir {out}",
    "SAMPLE": "sample --output-dir {out}",
    "RECONSTRUCT": "reconstruct --vqvae {x}/vqvae --output-dir {out}",
}


def test_mistakes_get_one_sentence_and_exit_code_2(
    copy_of_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, out, full = copy_of_run, tmp_path / "out", tmp_path / "full"
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (full / "thesis.txt").write_text("precious")
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "bag" / "x.jpg").write_text("no image")
    other = shutil.copytree(x / "codes", tmp_path / "other_codes")
    edit_manifest(other, encoder_hash="f" * 64)
    cut = shutil.copytree(x / "codes", tmp_path / "cut_codes")
    shard = cut / "train" / "00000.parquet"
    pq.write_table(pq.read_table(shard).slice(0, 5), shard)
    samples = tmp_path / "samples"
    run_here("sample", "--pipeline", x / "pipeline", "--num-images", 1, "--output-dir", samples)
    values = {
        "x": x, "photos": photos, "out": out, "empty": tmp_path / "empty", "full": full,
        "broken": broken, "other": other, "cut": cut, "samples": samples, "f": "f" * 12,
        "parts": f"--vqvae {x}/vqvae --priors {x}/prior_0 {x}/prior_1",
    }  # fmt: skip
    for line in MISTAKES.strip().splitlines():
        for word, meaning in SHORT.items():
            line = line.replace(word, meaning, 1) if line.startswith(word) else line  # noqa: PLW2901
        command, _, expected = line.format(**values).partition(" -> ")
        capsys.readouterr()
        assert main(command.split()) == 2, command
        text = capsys.readouterr().err
        assert "Traceback" not in text
        sentence = text.splitlines()[-1]
        assert sentence.startswith("vqvae2: error: ")
        for word in expected.split(" | "):
            assert word in sentence, (command, sentence)
        assert not out.exists(), command
    assert names_in(full) == {"thesis.txt"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "'--learning-rate'"),
        ("--size", "'--image.size'"),
        ("--model.image.size", "'--image.size'"),
        ("--epochs", "'--num-steps'"),
        ("--data", "'--data.path'"),
        ("--batchsize", "'--batch-size'"),
    ],
)
def test_a_flag_is_suggested_by_its_meaning(given: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown flag {given}; did you mean {meant}"):
        parse("train", [given, "3"])


def test_guidance_that_a_prior_cannot_give_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bottom = load_prior(run / "prior_1")
    bottom.config = dataclasses.replace(bottom.config, label_dropout=0.0)
    bottom.save_pretrained(tmp_path / "bottom")
    priors = (run / "prior_0", tmp_path / "bottom")
    words = ("--vqvae", run / "vqvae", "--priors", *priors, "--output-dir", tmp_path / "out")
    run_here("sample", *words, "--guidance-scale", 2, code=2)
    assert "the prior of level 1 was trained without label dropout" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    run_here("sample", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "one per level. (default: none)" in shown  # an empty list
    assert "By default all classes. --output-dir" in shown  # once is enough
    assert "(default: 1.0)" in shown
