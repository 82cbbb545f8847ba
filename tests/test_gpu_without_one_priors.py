"""The priors' CUDA paths on a machine without CUDA: training, scoring, sampling, editing."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from pipelines.editing import keep_levels, known_outside, repeat_known
from pipelines.pipeline import VQVAE2Pipeline
from prior import (
    Known,
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    SamplingConfig,
    TransformerConfig,
    TransformerPriorConfig,
    make_prior,
)
from prior.training import evaluate, make_loss
from tests.pretended_gpu import GPU, pretended_gpu
from vqvae2.config import PreprocessingConfig, VQVAE2Config
from vqvae2.model import VQVAE2

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")

SMALL = TransformerConfig(width=32, num_layers=1, num_heads=2, num_condition_layers=1)
SNAIL = PixelSNAILConfig(
    width=8, residual_channels=8, num_blocks=1, num_residual_blocks=1, num_heads=2
)
WINDOW = TransformerConfig(width=32, num_layers=1, num_heads=2, attention_rows=1)
NETWORKS: dict[str, Any] = {"transformer": SMALL, "window": WINDOW, "pixelsnail": SNAIL}
GRIDS, CODES, BATCH = ((1, 2), (2, 4)), 8, 4


def config_of(family: str, level: int) -> Any:
    kind = PixelSNAILPriorConfig if family == "pixelsnail" else TransformerPriorConfig
    facts: Any = {"class_names": ("a", "b"), "label_dropout": 0.1, "network": NETWORKS[family]}
    facts["views"], levels = ("flip", "top_left"), level + 1
    return kind(level=level, grids=GRIDS[:levels], codebook_sizes=(CODES,) * levels, **facts)


class HeldOut:
    """Rows of codes as a `CodeDataset` gives them, in the CPU's memory."""

    manifest = SimpleNamespace(values_per_image=0)

    def __init__(self, codes: list[torch.Tensor], labels: torch.Tensor) -> None:
        self.codes, self.labels = codes, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: range) -> dict[str, Any]:
        chosen = list(rows)
        return {"codes": [grid[chosen] for grid in self.codes], "labels": self.labels[chosen]}

    def unigram_bits(self, level: int) -> float:
        return 3.0


@pytest.mark.parametrize("family", NETWORKS)
def test_a_prior_lies_on_one_device_and_neither_training_nor_positions_wait(family: str) -> None:
    config = config_of(family, level=1)
    with pretended_gpu() as watch:
        # A training step.
        prior = make_prior(config).to(GPU).train()
        codes = [torch.randint(CODES, (BATCH, *grid)) for grid in GRIDS]
        labels = torch.randint(2, (BATCH,))
        batch = {"codes": [grid.to(GPU) for grid in codes], "labels": labels.to(GPU)}
        batch["views"] = torch.randint(3, (BATCH,)).to(GPU)
        watch.waits.clear()
        watch.arrivals.clear()
        with torch.autocast("cuda", torch.bfloat16):
            loss, figures = make_loss(config, token_corruption=0.1)(prior, batch)
        assert {tensor.device for tensor in (loss, *figures.values())} == {GPU}
        assert not watch.waits
        assert not watch.arrivals

        # Validation waits for its sum alone, however many batches there are.
        prior.eval()
        alone: Any = SimpleNamespace(device=GPU, process_index=0, num_processes=1)
        alone.reduce = lambda sums, reduction: sums
        held_out: Any = HeldOut(codes, labels)
        assert "bits_per_code" in evaluate(prior, held_out, alone, unigram_bits=1.0, batch_size=1)
        assert watch.waits.total() == 1

        # Sampling looks at the labels' range and the result, and brings the seeds: nothing waits or
        # arrives at a position, and with windows it waits only every fourth call.
        filters: Any = {"top_k": 4, "top_p": 0.9, "min_p": 0.01}
        given, seeds = (BATCH, batch["codes"][:1], batch["labels"]), range(BATCH)
        for compiled, bf16, settings in (
            (False, True, {"guidance_scale": 2.0, **filters}),
            (None, False, {}),
            (True, True, {"temperature": 0.0}),
        ):
            watch.waits.clear()
            watch.arrivals.clear()
            sampling = SamplingConfig(**settings)
            how: Any = {"sampling": sampling, "bf16": bf16, "compiled": compiled}
            assert prior.sample(*given, seeds=seeds, window=1, **how).device == GPU
            assert watch.waits.total() <= 3
            assert watch.arrivals.total() <= 1
            watch.waits.clear()
            assert prior.sample(*given, seeds=seeds, window=4, **how).device == GPU
            assert watch.waits.total() <= 3 + prior.config.num_positions // 4


def test_a_pipeline_samples_and_edits_on_one_device() -> None:
    """A picture's mask and codes may come from the CPU; pictures end there."""
    config = VQVAE2Config(
        image=PreprocessingConfig(size=(8, 16)),
        hidden_channels=8,
        residual_channels=8,
        code_dims=(8,),
        codebook_sizes=(CODES,),
    )
    priors = [("transformer", 0), ("pixelsnail", 1)]
    with pretended_gpu() as watch, mock.patch("pipelines.pipeline.refuse_mismatches"):
        parts = [make_prior(config_of(*prior)) for prior in priors]
        pipeline = VQVAE2Pipeline(VQVAE2(config), parts).to(GPU)
        image = torch.rand(1, 3, 8, 16).to(GPU)
        kept = [
            level and Known(*(tensor.cpu() for tensor in level))
            for level in keep_levels(pipeline.vqvae, image, 1)
        ]
        mask = torch.zeros(1, 8, 16, dtype=torch.bool)
        for known in ([], kept, known_outside(pipeline.vqvae, image, mask)):
            watch.waits.clear()
            given: Any = {"known": repeat_known(known, range(2)), "labels": ["a", "b"]}
            output = pipeline(2, **given, lanes=2, output_type="pt", compiled=True)
            assert {tensor.device.type for tensor in (output.images, *output.codes)} == {"cpu"}
            assert watch.waits.total() <= 2 * 8  # some per level, none per position
