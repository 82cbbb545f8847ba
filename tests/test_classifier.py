"""The classifier of evaluation: it learns, its features tell good from bad, it is made once."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from pipelines.evaluation import classifier as module
from pipelines.evaluation.classifier import (
    TRANSFORMATIONS,
    Classifier,
    ClassifierConfig,
    accuracy,
    accuracy_scores,
    blur,
    made_classifier,
    train_classifier,
    transform,
)
from vqvae2.common.errors import UserError


def pictures(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes `(N, 1, 16, 16)` with stripes across, stripes down, or squares: the classes 0, 1, 2."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = []
    for label in labels.tolist():
        phase = 16 * torch.rand(2, generator=generator)
        across, down = (torch.sin((place + shift) * 1.6) for place, shift in zip((y, x), phase))
        images.append((across, down, across * down)[label])
    noise = 0.2 * torch.randn(number, 1, 16, 16, generator=generator)
    waves = torch.stack(images)[:, None] * (0.4 + 0.6 * torch.rand(number, 1, 1, 1, generator=generator))
    return ((waves + noise).clamp(-1, 1) * 127.5 + 127.5).byte(), labels


@torch.no_grad()
def distance(classifier: Classifier, one: Tensor, other: Tensor) -> float:
    """The Frechet distance of features."""
    a, b = (classifier.features(images).double() for images in (one, other))
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    traces = a.var(0).sum() + b.var(0).sum() - 2 * product
    return float((a.mean(0) - b.mean(0)).square().sum() + traces)
