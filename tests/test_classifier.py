"""The classifier of evaluation: it learns, its features tell good from bad, it is made once."""

from pathlib import Path
from typing import Any
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
from vqvae2.data import to_images


def pictures(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes `(N, 1, 16, 16)` with stripes across, stripes down, or squares: the classes 0, 1, 2."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = []
    for label in labels.tolist():
        phase = 16 * torch.rand(2, generator=generator)
        across, down = (
            torch.sin((place + shift) * 1.6) for place, shift in zip((y, x), phase, strict=True)
        )
        images.append((across, down, across * down)[label])
    noise = 0.2 * torch.randn(number, 1, 16, 16, generator=generator)
    contrast = 0.4 + 0.6 * torch.rand(number, 1, 1, 1, generator=generator)
    return (
        (torch.stack(images)[:, None] * contrast + noise).clamp(-1, 1) * 127.5 + 127.5
    ).byte(), labels


def steps(number: int) -> Any:
    """Let every training have so many steps."""
    return mock.patch.multiple(module, FEWEST_STEPS=number, MOST_EPOCHS=0)


@torch.no_grad()
def distance(classifier: Classifier, one: Tensor, other: Tensor) -> float:
    """The Frechet distance of features."""
    a, b = (classifier.features(images).double() for images in (one, other))
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    traces = a.var(0).sum() + b.var(0).sum() - 2 * product
    return float((a.mean(0) - b.mean(0)).square().sum() + traces)


@pytest.mark.parametrize("labelled", [True, False])
def test_features_tell_good_from_bad(labelled: bool) -> None:
    """The distance from the training images rises with blur, noise and missing classes."""
    (images, labels), (others, other_labels) = pictures(300), pictures(240, seed=1)
    with steps(20):
        classifier = train_classifier(images, labels if labelled else None)
    if labelled:
        found = accuracy(classifier, others, other_labels)
        assert found.top_1 > 0.9
        assert found.per_class.keys() == {"0", "1", "2"}
    clear, generator = to_images(others), torch.Generator().manual_seed(0)
    noise = torch.randn(clear.shape, generator=generator)
    blurred = [clear, *(blur(clear, sigma) for sigma in (0.5, 1, 2))]
    noisy = [(clear + strength * noise).clamp(-1, 1) for strength in (0, 0.2, 0.4, 0.8)]
    fewer = [others[other_labels >= number] for number in range(3)]
    for worse_and_worse in (blurred, noisy, fewer):
        distances = [distance(classifier, images, some) for some in worse_and_worse]
        assert distances == sorted(distances)
        assert distances[-1] > 3 * distances[0]


def test_features_are_those_of_bytes_and_of_floats_at_any_size(tmp_path: Path) -> None:
    for size, channels in (((8, 8), 1), ((28, 36), 2), ((128, 64), 3)):
        names = ("a", "b")
        config = ClassifierConfig(size=size, channels=channels, class_names=names, of_labels=True)
        Classifier(config).save_pretrained(tmp_path)
        classifier = Classifier.from_pretrained(tmp_path)
        pixels = torch.randint(256, (2, channels, *size), dtype=torch.uint8)
        with torch.no_grad():
            features = classifier.features(pixels)
            assert torch.equal(features, classifier.features(to_images(pixels)))
            assert (features.shape, classifier(pixels).shape) == ((2, 224), (2, 2))


def test_a_classifier_is_made_once_for_the_same_images_and_labels(tmp_path: Path) -> None:
    images, labels = pictures(12)
    with steps(1):
        classifier, place = made_classifier(tmp_path, images, labels)
        with mock.patch.object(module, "train_classifier", side_effect=AssertionError):
            again, same = made_classifier(tmp_path, images.clone(), labels.tolist())
        anew = train_classifier(images, labels)
        assert same == place
        for name, tensor in classifier.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
            assert torch.equal(tensor, anew.state_dict()[name])  # the same arguments, the same bits
        others = [made_classifier(tmp_path, images.flip(0), labels), (classifier, place)]
        others.append(made_classifier(tmp_path, images, labels.flip(0)))
        others.append(made_classifier(tmp_path, images, seed=1))
        others.append(made_classifier(tmp_path, images, [0] * 12, seed=1))
    assert len({place for _, place in others}) == 5
    for unlabelled, _ in others[-2:]:  # one class alone teaches nothing
        assert unlabelled.config.class_names == TRANSFORMATIONS


def test_transformations_are_what_they_are_called() -> None:
    images = to_images(pictures(1)[0]).repeat(400, 1, 1, 1)
    changed, numbers = transform(images, torch.Generator().manual_seed(0))
    by_name = {TRANSFORMATIONS[n]: changed[numbers == n][0] for n in numbers.unique().tolist()}
    assert len(by_name) == len(TRANSFORMATIONS)
    image = images[0]
    assert torch.equal(by_name["as it is, clear"], image)
    assert torch.equal(by_name["upside down, clear"], image.flip(1, 2))
    assert torch.equal(by_name["halves exchanged, clear"], image.roll((8, 8), (1, 2)))
    assert by_name["as it is, blurred"].var() < image.var()
    assert torch.equal(by_name["as it is, coarse"][:, ::2], by_name["as it is, coarse"][:, 1::2])


def test_classification_accuracy_scores_compare_sets_of_equal_size() -> None:
    """Images that show their classes teach more than images with wrong labels."""
    images, labels = pictures(300)
    wrong = labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    training = {"real": (images, labels), "samples": (images[:100], wrong[:100])}
    with steps(20), mock.patch.object(module, "train_classifier", wraps=train_classifier) as train:
        scores = accuracy_scores(training, pictures(90, seed=1), class_names=("a", "b", "c"))
    assert [len(call.args[0]) for call in train.call_args_list] == [100, 100]
    assert scores["real"].top_1 > 0.9
    assert scores["samples"].top_1 < 0.7
    assert scores["real"].per_class.keys() == {"a", "b", "c"}
    training["samples"] = (images[:30], [0] * 30)
    with pytest.raises(UserError, match="samples: 30 images have fewer than two classes"):
        accuracy_scores({"samples": training["samples"]}, training["real"], class_names="abc")
