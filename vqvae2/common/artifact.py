"""Models as folders: `config.json` + `model.safetensors`, loaded strictly, no pickle."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vqvae2.common.config import differences, from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import looks_like_path, read_json, whole_file, write_json
from vqvae2.common.vocabulary import INDEX_NAME, TRAINING_RECORD

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
HASHES = "hashes"  # of the configuration and of the weights, in the metadata of the weights


class OtherConfiguration(UserError):
    """Weights that a model of another configuration has made."""

    def __str__(self) -> str:
        return f"{super().__str__()}: the weights belong to another configuration."


def local_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a local path, or of a downloaded Hub id (never of what looks like a path).

    Raises:
        UserError: there is none.
    """
    path, wanted = Path(name).expanduser(), ["*.json", "*.safetensors"]
    if path.is_dir():
        if (path / TRAINING_RECORD).exists() and not (path / WEIGHTS_NAME).exists():
            seen = f"{name} holds a training run that has no model yet"
            raise UserError(f"{seen}: let it run to its first validation (its end, without one).")
        return path
    if looks_like_path(str(name)):
        raise UserError(f"{name} is not a folder: check the path, or make it by the earlier step.")
    from huggingface_hub import snapshot_download  # 0.2 s, which only the Hub's users wait

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; the user needs one sentence
        first_line = (str(error) or "no message").splitlines()[0]
        problem = f"{name} is neither a local folder nor a repository that the Hub delivers"
        raise UserError(f"{problem} ({type(error).__name__}: {first_line}).") from None


class Artifact(nn.Module):
    """A model that saves as a folder, loads back strictly, and can be pushed to the Hub.

    Subclasses are made from one dataclass, their `config_class`, whose `summary()` says in a few
    words what they are.
    """

    config_class: ClassVar[type]
    config: Any

    def __repr__(self) -> str:
        """One line; `torch.nn.Module.__repr__(model)` lists the layers."""
        size = f"{self.num_parameters:,} parameters, {self.device}"
        return f"{type(self).__name__}({self.config.summary()}, {size})"

    @property
    def num_parameters(self) -> int:
        """How many numbers the network learns."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model of vqvae2",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hub (`namespace/name`), which
        is made if it is not there. Returns the URL of the commit; raises as `HfApi` does."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch
            )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(save_directory).expanduser()
        state: dict[str, Tensor] = self.state_dict()
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        config = {"architecture": type(self).__name__, **to_dict(self.config)}
        hashes = f"{content_hash(config, ())} {content_hash({}, state.items())}"
        with whole_file(folder / WEIGHTS_NAME) as aside:  # one entry: several come in any order
            save_file(state, aside, metadata={HASHES: hashes})
        write_json(folder / CONFIG_NAME, config)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
        """Load a local folder, or a Hub repository (`namespace/name`), for evaluation on the CPU.

        Raises:
            UserError: a missing, broken or wrong configuration; or see `load_weights`.
        """
        folder = local_folder(name, revision=revision)
        if (folder / INDEX_NAME).exists() and not (folder / CONFIG_NAME).exists():
            parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
            what = f"{name} is a pipeline, but a model was expected"
            raise UserError(f"{what}: give a part of it ({', '.join(parts)}).")
        data = read_json(folder / CONFIG_NAME)
        config_hash = content_hash(data, ())
        kind = data.pop("architecture", None)
        if kind != cls.__name__:
            problem = f"{folder} holds a model of kind {kind!r}, but {cls.__name__!r} was expected"
            raise UserError(f"{problem}: check which folder goes where.")
        config: Any = from_dict(cls.config_class, data, str(folder / CONFIG_NAME))
        # A configuration that was changed could ask for more memory than there is.
        path = folder / WEIGHTS_NAME
        if path.is_file() and _saved_hashes(path)[:1] != [config_hash]:
            weights, needed = path.stat().st_size, state_bytes(partial(cls, config))
            if needed > 8 * weights:
                sizes = f"has {weights:,} bytes, but {CONFIG_NAME} asks for {needed:,}"
                raise OtherConfiguration(f"{path} {sizes}")
        with torch.random.fork_rng(devices=[]):  # its first weights are random
            model = cls(config)
        load_weights(model, folder)
        _check_hash(folder / CONFIG_NAME, 0, config_hash)
        return model.eval()


def state_bytes(make_model: Callable[[], nn.Module]) -> int:
    """How many bytes of weights a model would have; none are made."""
    with torch.device("meta"):
        return sum(tensor.nbytes for tensor in make_model().state_dict().values())


def machine_memory() -> int:
    """Bytes of memory of this machine; of a container, what it may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def check_memory(make_model: Callable[[], nn.Module]) -> None:
    """Raise a `UserError` for a model whose weights alone exceed this machine's memory."""
    needed = state_bytes(make_model)
    memory = machine_memory()
    if needed > memory:
        sizes = f"{needed / 2**30:,.1f} GiB of weights, but this machine has {memory / 2**30:,.1f}"
        raise UserError(f"the network has {sizes} GiB of memory: make it smaller.")


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` into a model, strictly.

    Raises:
        UserError: the file is missing or broken, or see `check_weights`.
    """
    path = folder / WEIGHTS_NAME
    state = read_tensors(path)
    check_weights(path, model.state_dict(), state)
    _check_hash(path, 1, content_hash({}, state.items()))
    model.load_state_dict(state)


def check_saved(folder: Path) -> None:
    """Raise a `UserError` if a saved model was cut off, or a file of it is missing; no weights are
    read."""
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt"):
            json.loads((folder / CONFIG_NAME).read_bytes())
    except Exception as error:  # of many kinds, for the header may say anything
        what = f"{folder}: the model is damaged ({str(error)[:200]})"
        raise UserError(f"{what}: restore it, or train anew in another folder.") from None


def load_other_weights(model: Artifact, folder: Path) -> None:
    """Load the weights that another run has made, as `load_weights` does; if they do not fit, the
    `UserError` says which of its settings are others."""
    try:
        load_weights(model, folder)
    except OtherConfiguration as error:
        is_there = (folder / CONFIG_NAME).is_file()
        raise UserError(f"{error}{_other_settings(model, folder) if is_there else ''}") from None


def _other_settings(model: Artifact, folder: Path) -> str:
    """A sentence about what a folder's configuration has that a model's has not."""
    data = read_json(folder / CONFIG_NAME)
    kind, own = data.pop("architecture", None), type(model).__name__
    if kind not in (None, own):
        return f" It is a {kind}, and here a {own} is trained."
    changed = differences(model.config_class, data, to_dict(model.config))
    shown = [f"{key} = {before!r}, here {after!r}" for key, before, after in changed]
    shown = [text for text in shown if "_hash = " not in text][:4]
    return f" It has {'; '.join(shown)}: repeat its settings." if shown else ""


def _check_hash(path: Path, place: int, found: str) -> None:
    """Raise a `UserError` if a model's configuration (place 0) or weights (1) are not as they were
    saved. Folders of earlier versions do not say."""
    saved = _saved_hashes(path.with_name(WEIGHTS_NAME))
    if len(saved) == 2 and saved[place] != found:
        raise UserError(f"{path} was changed after the model was saved: restore or remake it.")


def _saved_hashes(weights: Path) -> list[str]:
    """The hashes of configuration and weights; none where the file does not say."""
    try:
        with safe_open(weights, "pt") as file:
            return (file.metadata() or {}).get(HASHES, "").split()
    except Exception:  # of many kinds; reading the weights says what is wrong
        return []


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError: it is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: let the earlier step write it first.") from None
    except Exception as error:  # of many kinds, for the header may say anything
        raise UserError(f"{path} cannot be read as safetensors ({error}): remake it.") from None


def read_weights(path: Path, advice: str) -> dict[str, Tensor]:
    """The tensors of a file of weights, in safetensors or as `torch.save` writes them; no code that
    a file may hold is run.

    Raises:
        UserError: there is no such file, or it is none of weights; `advice` ends the sentence.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: {advice}.")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in state.items()}
    except Exception as error:  # both libraries raise many kinds
        kind = type(error).__name__
        raise UserError(f"{path} cannot be read as weights ({kind}): {advice}.") from None


def load_all_weights(network: nn.Module, path: Path, advice: str) -> None:
    """Give a network the weights of a file, all of them and no others. Raises as `read_weights`
    and `check_weights`."""
    state = read_weights(path, advice)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):  # files of old versions of torch lack it
            state.setdefault(key, value)
    check_weights(path, network.state_dict(), state)
    network.load_state_dict(state)


def check_weights(place: Any, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` unless these are weights for a model whose own are `expected`: the same
    names and shapes, numbers of the same kind, all finite. `place` begins the message."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise OtherConfiguration(f"{place} lacks the weight {name!r}")
        if name not in expected:
            raise OtherConfiguration(f"{place} holds the unknown weight {name!r}")
        given, own = state[name], expected[name]
        shape, right = tuple(given.shape), tuple(own.shape)
        allowed = FLOATS if own.dtype in FLOATS else (own.dtype,)
        if shape != right:
            what = f"{name!r} has shape {shape} instead of {right}"
            raise OtherConfiguration(f"{place}: {what}")
        if given.dtype not in allowed:
            what = f"{name!r} is of type {given.dtype} instead of {own.dtype}"
            raise OtherConfiguration(f"{place}: {what}")
        if not given.to(own.dtype).isfinite().all():
            raise UserError(f"{place}: {name!r} is not finite: the file is unusable.")


def content_hash(config: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a configuration and of tensors' names, types, shapes and bytes, in any order."""
    digest = hashlib.sha256()
    plain = to_dict(config) if dataclasses.is_dataclass(config) else config
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
