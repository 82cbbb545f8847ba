"""Models as folders: `config.json` + `model.safetensors`, loaded strictly, no pickle."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqvae2.common.config import from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, whole_file, write_json

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a local folder. Hub ids are `namespace/name`, with no local folder `namespace`."""
    return (
        name.startswith((".", "~", "/"))
        or name.count("/") != 1
        or "\\" in name
        or Path(name.split("/", maxsplit=1)[0]).exists()
    )


def local_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a local path, or of a Hub id after downloading it. A name that looks like a path never asks the network.

    Raises:
        UserError: there is no such folder, and the Hub has no such repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if looks_like_path(str(name)):
        raise UserError(
            f"{name} is not a folder: check the path, or make it with the earlier step."
        )
    try:
        return Path(
            snapshot_download(
                str(name), revision=revision, allow_patterns=["*.json", "*.safetensors"]
            )
        )
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        reason = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )
        raise UserError(
            f"{name} is neither a local folder nor a repository that the Hub delivers ({reason})."
        ) from None


class Artifact(ModelHubMixin):
    """A model that saves as a folder and loads back strictly: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    Subclasses are `nn.Module`s whose constructor takes one dataclass, named in `config_class`.
    """

    config_class: ClassVar[type]
    config: Any

    def save_pretrained(self, save_directory: str | Path, **for_the_mixin: Any) -> None:
        """Write `config.json` and `model.safetensors` into a folder, each whole or not at all.

        `push_to_hub(repo_id)` does the same and uploads them; its other arguments have no say in what is written.
        """
        folder = Path(save_directory)
        state = self.state_dict()  # type: ignore[attr-defined]
        with whole_file(folder / WEIGHTS_NAME) as aside:
            save_file(
                {name: tensor.contiguous() for name, tensor in state.items()},
                aside,
                metadata={"format": "pt"},
            )
        write_json(
            folder / CONFIG_NAME, {"architecture": type(self).__name__, **to_dict(self.config)}
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:  # type: ignore[override]
        """Load a local folder, or a repository of the Hub (`namespace/name`), in evaluation mode on the CPU.

        Raises:
            UserError: a file is missing or broken, a key of the configuration is unknown, or a weight is missing, extra or of another shape.
        """
        folder = local_folder(name, revision=revision)
        model = cls(cls.read_config(folder))
        load_weights(model, folder)  # type: ignore[arg-type]
        return model.eval()  # type: ignore[attr-defined]

    @classmethod
    def read_config(cls, folder: Path) -> Any:
        """The configuration of the model in a local folder, without its weights.

        Raises:
            UserError: the file is missing or broken, is of another kind of model, or has an unknown key.
        """
        data = read_json(folder / CONFIG_NAME)
        architecture = data.pop("architecture", None)
        if architecture != cls.__name__:
            raise UserError(
                f"{folder} holds a model of kind {architecture!r}, but {cls.__name__!r} was expected: check which folder goes where."
            )
        return from_dict(cls.config_class, data, str(folder / CONFIG_NAME))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` into a model, strictly.

    Raises:
        UserError: the file is missing or broken, or does not hold exactly the model's weights.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: the folder holds no finished model; let the training write one first."
        )
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): restore or remake it."
        ) from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise UserError(
                f"{path} lacks the weight {name!r}: the file belongs to another configuration."
            )
        if name not in expected:
            raise UserError(
                f"{path} holds the unknown weight {name!r}: the file belongs to another configuration."
            )
        if expected[name].shape != state[name].shape:
            raise UserError(
                f"{path}: {name!r} has shape {tuple(state[name].shape)}, but the configuration says {tuple(expected[name].shape)}."
            )
    model.load_state_dict(state)


def content_hash(config: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a configuration and named tensors (names, types, shapes, bytes): equal exactly when the content is."""
    digest = hashlib.sha256()
    plain = to_dict(config) if dataclasses.is_dataclass(config) else config
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
