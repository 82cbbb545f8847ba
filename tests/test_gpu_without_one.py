"""The CUDA paths on a machine without CUDA: everything on one device, and no waits in hot loops."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from pipelines.encoding import encode_lanes
from tests.pretended_gpu import GPU, pretended_gpu
from vqvae2.common.accelerate import native_bf16, processes
from vqvae2.common.loading import ShuffledLoader
from vqvae2.config import (
    DataConfig,
    DiscriminatorConfig,
    QuantizerConfig,
    TrainVQVAEConfig,
    VQVAE2Config,
)
from vqvae2.discriminator import AdversarialPair
from vqvae2.losses import make_adversarial_term, make_loss
from vqvae2.model import VQVAE2
from vqvae2.nearest import nearest
from vqvae2.training import evaluate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

STAGE_1: Any = {  # quantizer, precision, and whether a discriminator trains along
    "ema": ({"kind": "ema"}, torch.bfloat16, True),
    "cosine": ({"kind": "cosine", "estimator": "rotation"}, None, False),
    "gradient": ({"kind": "gradient"}, torch.bfloat16, False),
    "fsq": ({"kind": "fsq", "fsq_levels": (4, 4)}, None, True),
}


@pytest.mark.parametrize("kind", STAGE_1)
def test_stage_1_lies_on_one_device_and_its_steps_never_wait(kind: str) -> None:
    settings, precision, adversary = STAGE_1[kind]
    config = VQVAE2Config(
        hidden_channels=8,
        residual_channels=8,
        quantizer=QuantizerConfig(**settings),
        code_dims=(2 if kind == "fsq" else 8,),
        codebook_sizes=(16,),
        level_dropout=0.1,
    )
    with pretended_gpu() as watch:
        # Two training steps. At the first one a codebook asks, once, whether it has started.
        model: Any = VQVAE2(config).to(GPU)
        autoencoder, term = model, None
        if adversary:
            facts = DiscriminatorConfig(weight=0.8, hidden_channels=8, num_layers=1)
            model = AdversarialPair(model, facts).to(GPU)
            autoencoder = model.autoencoder
            model.start = -1
            term = make_adversarial_term(facts, autoencoder.last_layer)
        loss_fn = make_loss("mse", config.codebook_size_per_level, adversarial=term)
        images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
        batch = {"images": images.to(GPU)}
        model.train()
        for _ in range(2):
            watch.waits.clear()
            enabled = precision is not None
            with torch.autocast("cuda", precision or torch.bfloat16, enabled=enabled):
                loss, figures = loss_fn(model, batch)
            assert {tensor.device for tensor in (loss, *figures.values())} == {GPU}
        assert not watch.waits
        assert not watch.refused  # with --deterministic

        # Validation waits at its end alone: for three sums, and for two figures per level.
        autoencoder.eval()
        alone: Any = SimpleNamespace(device=GPU, process_index=0, num_processes=1)
        alone.reduce = lambda sums, reduction: sums
        training = TrainVQVAEConfig(output_dir="x", data=DataConfig(path="x"), batch_size=4)
        assert "usage_1" in evaluate(autoencoder, _Images(images), alone, training)
        assert watch.waits.total() <= 3 + 2 * config.num_levels

        # Extraction asks per level whether all is finite, and fetches the codes; the way back.
        watch.waits.clear()
        levels = encode_lanes(autoencoder, images, bf16=precision is not None)
        assert [codes.shape for codes in levels] == [(4, 4), (4, 16)]
        assert watch.waits.total() == 2 * config.num_levels
        codes = [levels[0].view(4, 2, 2).to(GPU), levels[1].view(4, 4, 4).to(GPU)]
        assert autoencoder.decode_codes(codes).device == GPU


def test_a_gpu_searches_many_vectors_at_once() -> None:
    """Each piece costs launches of kernels; a CPU is fastest with pieces of 4,096 vectors."""
    with pretended_gpu() as watch:
        nearest(torch.empty(20_000, 8, device=GPU), torch.empty(512, 8, device=GPU))
    assert watch.calls[torch.ops.aten.addmm] == 1


def test_a_gpu_that_is_not_wanted_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with mock.patch("torch.cuda.is_available", return_value=True):  # its questions would fail
        native_bf16()
        batches = ShuffledLoader([torch.zeros(1)], 1).start_at(0)
        assert not next(batches).is_pinned()


def test_fp32_is_not_tf32_and_sums_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    processes()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_exact_convolutions_are_so_with_the_newer_setting_too() -> None:
    """In a process of its own: torch forbids to use both settings, the older and the newer."""
    program = """
import torch
from vqvae2.common.torch_settings import exact_convolutions
if hasattr(torch.backends, "fp32_precision"):
    torch.backends.fp32_precision = "tf32"
    with exact_convolutions():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


class _Images:
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Any) -> dict[str, torch.Tensor]:
        return {"images": self.images[list(indices)]}
