"""What is promised to those who call the packages from programs of their own."""

import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from pipelines import VQVAE2Pipeline
from pipelines.labels import label_numbers
from prior.attention import kept_mask
from prior.config import TransformerConfig, TransformerPriorConfig
from prior.probes import Rows, fresh_copy, nats_per_row
from prior.sampling import Known
from prior.transformer import TransformerPrior
from vqvae2.common.config import Config
from vqvae2.common.errors import Stopped, UserError
from vqvae2.config import DataConfig, PreprocessingConfig, TrainVQVAEConfig, VQVAE2Config
from vqvae2.data import load_images
from vqvae2.data.open_arrays import PythonImages
from vqvae2.model import VQVAE2
from vqvae2.quantizers import rotation
from vqvae2.training import train

GREY = PreprocessingConfig(size=(16,), channels=1)
SMALL: dict[str, Any] = {"image": GREY, "codebook_sizes": (16,), "code_dims": (8,)}
SMALL |= {"hidden_channels": 16, "residual_channels": 8, "num_residual_blocks": 1}


def some_bytes(number: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 16, 16), np.uint8)


def dropping_prior() -> TransformerPrior:
    """A prior with much dropout whose logits depend on its inputs, in training mode."""
    network = TransformerConfig(width=32, num_layers=2, num_heads=2, dropout=0.5)
    facts: Any = {"level": 0, "grids": ((4, 4),), "codebook_sizes": (16,)}
    prior = TransformerPrior(TransformerPriorConfig(**facts, network=network))
    return fresh_copy(prior, noise=True).train()  # type: ignore[return-value]


# The caller's state


def test_a_training_gives_back_random_numbers_and_settings(tmp_path: Path) -> None:
    steps: Any = {"num_steps": 1, "warmup_steps": 0, "batch_size": 8, "deterministic": True}
    draws: list[Callable[[], float]] = [
        random.random,
        lambda: float(np.random.rand()),
        lambda: torch.rand(()).item(),
    ]
    found = []
    for trained in (True, False):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if trained:
            data, model = DataConfig(path="-"), VQVAE2Config(**SMALL)
            config = TrainVQVAEConfig(
                data=data, model=model, output_dir=str(tmp_path / "run"), **steps
            )
            train(config, images={"images": some_bytes()})
            VQVAE2.from_pretrained(tmp_path / "run")
            assert not torch.are_deterministic_algorithms_enabled()
        found.append([draw() for draw in draws])
    assert found[0] == found[1]


def test_trainings_give_back_torchs_precision(tmp_path: Path) -> None:
    config = TrainVQVAEConfig(
        data=DataConfig(path="-"), model=VQVAE2Config(**SMALL), output_dir=str(tmp_path / "run"),
        num_steps=1, batch_size=4, num_threads=1,
    )  # fmt: skip
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        train(config, images={"images": some_bytes()})
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_torchs_own_settings_of_precision_stay_and_can_be_read() -> None:
    """In processes of their own: torch refuses to tell of settings that contradict each other."""
    program = """
import os
import torch
from vqvae2.common.torch_settings import exact_convolutions, set_arithmetic, settings_restored

def check(setting, name):
    exec(setting)
    with settings_restored():
        set_arithmetic()
        torch.get_float32_matmul_precision()
        with exact_convolutions(), exact_convolutions():
            assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic
    assert repr(eval(name)) in setting, eval(name)

for case in {cases}:
    if os.fork() == 0:
        check(*case)
        os._exit(0)
    assert os.wait()[1] == 0, case
"""
    cases = [("torch.set_float32_matmul_precision('high')", "torch.get_float32_matmul_precision()")]
    if hasattr(torch.backends, "fp32_precision"):
        for value in ("ieee", "tf32"):
            for place in ("", ".cudnn.conv", ".cuda.matmul", ".mkldnn.matmul"):
                name = f"torch.backends{place}.fp32_precision"
                cases.append((f"{name} = '{value}'", name))
    text = program.format(cases=cases)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_parts_that_were_frozen_stay_frozen() -> None:
    model = VQVAE2(VQVAE2Config(**SMALL)).train()
    model.quantizers.eval()
    model.encode_images(some_bytes(2)[:, None] / 127.5 - 1)
    assert model.training
    assert not any(module.training for module in model.quantizers.modules())


def test_a_mask_that_inference_has_made_serves_training() -> None:
    with torch.inference_mode():
        mask = kept_mask(torch.ones, 3)
    assert not mask.is_inference()


def test_a_clean_stop_crosses_processes() -> None:
    stopped = pickle.loads(pickle.dumps(Stopped("runs/x: stopped at step 3", 15)))
    assert (str(stopped), stopped.signal_number) == ("runs/x: stopped at step 3", 15)


def test_a_model_is_saved_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    VQVAE2(VQVAE2Config(**SMALL)).save_pretrained("~/model")
    VQVAE2Pipeline.from_pretrained(run / "pipeline").save_pretrained("~/pipeline")
    VQVAE2.from_pretrained("~/model")
    VQVAE2Pipeline.from_pretrained("~/pipeline")


# Images in memory


class Endless(Dataset):
    """As torch asks for it: a length, and no IndexError at the end."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"images": torch.full((16, 16), index, dtype=torch.uint8), "labels": index % 3}


class Stream(IterableDataset):
    """With a length, but no numbered rows."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"images": image} for image in some_bytes())


def test_images_in_memory_may_be_of_many_kinds() -> None:
    images = torch.from_numpy(some_bytes())
    kinds: list[PythonImages] = [
        images,
        images.numpy(),
        {"images": list(images)},
        [{"images": image} for image in images],
    ]
    for kind in kinds:
        assert len(load_images(kind, GREY).train) == 37
    numbers = images.bfloat16().requires_grad_()
    assert len(load_images(numbers, replace(GREY, value_range=(0.0, 256.0))).train) == 37
    assert len(load_images(Stream(), GREY).train) == 37
    splits = load_images(Endless(), GREY)
    assert (len(splits.train), splits.class_names) == (37, ("0", "1", "2"))


def test_images_in_memory_of_other_kinds_are_named() -> None:
    images = some_bytes()
    cases: list[tuple[Any, str]] = [
        ({"images": images, "label": [1] * 40}, "'label', which is unknown.* mean 'labels'"),
        ([{"images": images[0]}, {"images": images[0], "class": 1}], "'class', which is unknown"),
        ([(images[0], 1)], "row 0 is of type tuple, but must be a mapping"),
        ([], "holds no image"),
        (images[:0], "holds no image"),
        (images[0], "images of shape"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            load_images(given, GREY)


# Models


def test_priors_draw_and_judge_without_dropout_in_any_mode() -> None:
    prior = dropping_prior()
    seeds, state = [1, 2, 3, 4], torch.get_rng_state()
    codes = prior.sample(4, seeds=seeds)
    assert torch.equal(codes, prior.sample(4, seeds=seeds))
    rows = Rows(codes, (), None)
    assert torch.equal(nats_per_row(prior, rows), nats_per_row(prior, rows))
    assert prior.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(codes, prior.eval().sample(4, seeds=seeds))


def test_what_cannot_be_drawn_is_named() -> None:
    prior, grid = dropping_prior().eval(), torch.zeros(2, 4, 4, dtype=torch.int64)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 0] = True
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seeds": [1]}, "1 seeds for 2 images"),
        ({"seeds": [1, -1]}, "0 or more"),
        ({"seeds": [1, 2**64]}, "at most 2"),
        ({"seeds": [1, 1.5]}, "a whole number"),
        (
            {"known": Known(grid, mask.float())},
            r"known mask .*float32.* must be a tensor torch\.bool",
        ),
        ({"known": Known(grid.int(), mask)}, "known codes .*int32"),
        ({"known": Known(grid[:1], mask)}, r"known codes .*\(1, 4, 4\)"),
        ({"known": Known(grid + 16, mask)}, "range from 0 to 16, but must be from 0 to 15"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            prior.sample(2, **({"seeds": [1, 2]} | changes))
    with pytest.raises(UserError, match="batch_size is 0"):
        prior.sample(0, seeds=[])


def test_what_is_no_batch_of_images_is_named() -> None:
    model = VQVAE2(VQVAE2Config(**SMALL))
    images = torch.zeros(2, 1, 16, 16)
    for wrong in (images[0], images[:0], images.byte()):
        with pytest.raises(UserError, match=r"but must be \(B, C, H, W\)"):
            model(wrong)
    with pytest.raises(UserError, match=r"torch\.bool"):
        model.encode_images(images.bool())
    with pytest.raises(UserError, match=r"weights are torch\.bfloat16.* train in float32"):
        model.bfloat16().train()(images.bfloat16())


def test_a_vector_without_a_direction_is_not_rotated() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    embeddings = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    result = rotation(vectors, embeddings)
    assert torch.allclose(result, embeddings, atol=1e-6)
    result.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().max() < 10


def test_labels_may_be_numbers_of_any_library() -> None:
    names = ("cat", "dog")
    labels: list[Any] = [1, "dog", np.int64(1), np.array([1]), torch.tensor(1), [torch.tensor(1)]]
    for given in (*labels, {"dog"}, {"dog": 0}.keys(), (label for label in ["dog"])):
        assert label_numbers(given, names, can_hide=False) == [1]


def test_numbers_of_a_call_are_whole(run: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(run / "pipeline")
    for wrong in ({"num_images": 1.0}, {"seed": None}, {"lanes": "4"}, {"first_index": 0.5}):
        with pytest.raises(UserError, match="must be a whole number"):
            pipeline(**{"num_images": 1, "labels": 0, **wrong})  # type: ignore[arg-type]
    how: Any = {"num_images": 1, "output_type": "pt", "show_progress": False}
    for label, seed in ((np.int64(1), np.int64(3)), (1, 3)):
        images = pipeline(labels=label, seed=seed, **how).images
        assert torch.equal(images, pipeline(labels=1, seed=3, **how).images)


# Configurations


@dataclass(frozen=True, kw_only=True)
class Own(Config):
    size: tuple[int, str] = (1, "a")
    rate: int | float = 1
    name: int | str | None = None


def test_own_configurations_are_held_to_their_types() -> None:
    assert Own(size=[2, "b"]).size == (2, "b")  # type: ignore[arg-type]
    assert (Own(rate=0.5).rate, Own(name="x").name, Own(name=None).name) == (0.5, "x", None)
    with pytest.raises(UserError, match=r"size\[1\] is 2, but must be of type str"):
        Own(size=(1, 2))  # type: ignore[arg-type]

    @dataclass(frozen=True, kw_only=True)
    class Impossible(Config):
        paths: list[str]

    with pytest.raises(TypeError, match="paths is declared as"):
        Impossible(paths=["a"])
