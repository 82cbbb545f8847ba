"""The audit finds what it is for: a planted bug fails its checks and no other; the healthy pass."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

import prior.attention
import prior.audit
import prior.probes
import prior.training
from pipelines.commands.doctor import check_round_trip, examine, examine_prior, load
from pipelines.config import DoctorConfig
from pipelines.encoding import encode_lanes
from pipelines.pictures import make_sample_drawer
from prior import TrainPriorConfig, TransformerConfig, TransformerPrior, TransformerPriorConfig
from prior.attention import KVCache, Slots, attend
from prior.audit import audit, check_attention, check_vector_helps, stop_if_unsound
from prior.base import Prior
from prior.manifest import CodeDataset, read_manifest
from prior.probes import fresh_copy, random_rows
from prior.registry import load_prior, make_prior
from prior.training import prior_config
from tests.conftest import command, edit_manifest, edit_shard, vqvae2
from vqvae2 import VQVAE2
from vqvae2.common.checks import Finding
from vqvae2.common.errors import UserError
from vqvae2.common.metrics import best_validation
from vqvae2.common.vocabulary import SPLITS
from vqvae2.config import QuantizerConfig
from vqvae2.quantizers import CodebookQuantizer, make_quantizer

FACTS = {
    "level": 1,
    "grids": ((2, 3), (4, 6)),
    "codebook_sizes": (17, 11),
    "class_names": ("a", "b", "c"),
    "label_dropout": 0.1,
}


def make(kind: type[TransformerPrior] = TransformerPrior, **facts) -> TransformerPrior:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = TransformerConfig(width=32, num_layers=2, num_heads=2, num_condition_layers=1)
    return kind(TransformerPriorConfig(**{**FACTS, **facts}, network=network))


def failures(prior: Prior) -> dict[str, str]:
    return {finding.name: finding.message for finding in audit(prior) if not finding.passed}


# Bugs of priors. What is wrong in forward alone also makes the cached steps differ from it.


class LeakyMask(TransformerPrior):
    """Attention sees the future."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.causal = False


class LeakBehindZeros(LeakyMask):
    """The same behind an output layer that starts at zero: the same logits for everything."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        nn.init.zeros_(self.head.weight)


class Plane(TransformerPrior):
    """A one-hot input whose whole plane is set: every position knows which codes occur (vvvm23)."""

    def forward(
        self, codes: Tensor, condition: Any = (), labels: Any = None, views: Any = None
    ) -> Tensor:
        bag = self.embedding(codes.flatten(1)).mean(dim=1)
        return super().forward(codes, condition, labels) + self.head(bag)[:, :, None, None]


class FirstSeesAll(TransformerPrior):
    """A first position with all keys masked attends to all of them (kamenbliznashki)."""

    def forward(
        self, codes: Tensor, condition: Any = (), labels: Any = None, views: Any = None
    ) -> Tensor:
        logits = super().forward(codes, condition, labels)
        mean = self.head(self.embedding(codes.flatten(1)).mean(dim=1))[:, :, None, None]
        return logits + F.pad(mean, (0, logits.shape[3] - 1, 0, logits.shape[2] - 1))


class Below(TransformerPrior):
    """The neighbouring codes that are read lie a row too low."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        assert self.neighbours is not None
        slots = self.neighbours.slots
        slots.add_(config.grids[-1][1]).clamp_(max=config.num_positions)


class Shifted(TransformerPrior):
    """The input is shifted by another number of positions than one."""

    by = 0

    def __init__(self, config: TransformerPriorConfig) -> None:
        network = dataclasses.replace(config.network, reads_neighbours=False)
        super().__init__(dataclasses.replace(config, network=network))

    def forward(
        self, codes: Tensor, condition: Any = (), labels: Any = None, views: Any = None
    ) -> Tensor:
        flat = codes.flatten(1)
        read = F.pad(flat[:, : flat.shape[1] - self.by], (self.by, 0), value=self.codebook_size)
        x = self.embedding(read) + self.background(len(codes), condition, labels)
        for block in self.blocks:
            x = block(x, self.angles)
        return self.head(self.norm(x)).transpose(1, 2).unflatten(2, codes.shape[1:])


class ShiftedByTwo(Shifted):
    """Position t reads the codes up to t - 2."""

    by = 2


def zeros_like(condition: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(codes) for codes in condition]


class ConditionNotInSteps(TransformerPrior):
    """Sampling forgets the condition."""

    def start(self, batch_size: int, condition, labels, **options):  # type: ignore[no-untyped-def]
        return super().start(batch_size, zeros_like(condition), labels, **options)


class ConditionIgnored(TransformerPrior):
    """The condition network is there and not used."""

    def background(self, batch_size: int, condition: Any, labels: Any, views: Any = None) -> Tensor:
        assert self.labels is not None
        return self.positions().expand(batch_size, -1, -1) + self.labels(labels)[:, None]


class ConditionInPart(TransformerPrior):
    """Of the coarser level only the first row is used."""

    def background(self, batch_size: int, condition: Any, labels: Any, views: Any = None) -> Tensor:
        first_rows = [codes[:, :1].expand_as(codes) for codes in condition]
        return super().background(batch_size, first_rows, labels)


class ConditionNotEverywhere(TransformerPrior):
    """The first position does not depend on the condition."""

    def background(self, batch_size: int, condition: Any, labels: Any, views: Any = None) -> Tensor:
        everywhere = super().background(batch_size, condition, labels)
        nowhere = super().background(batch_size, zeros_like(condition), labels)
        return torch.cat([nowhere[:, :1], everywhere[:, 1:]], dim=1)


class LabelIgnored(TransformerPrior):
    """All classes are the same one."""

    def background(self, batch_size: int, condition: Any, labels: Any, views: Any = None) -> Tensor:
        assert labels is not None
        return super().background(batch_size, condition, torch.zeros_like(labels))


class Unused(TransformerPrior):
    """A weight that nothing reads."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        self.forgotten = nn.Parameter(torch.ones(3))


class ChangesItself(TransformerPrior):
    """A mask that is written into the weight at every forward."""

    def forward(
        self, codes: Tensor, condition: Any = (), labels: Any = None, views: Any = None
    ) -> Tensor:
        self.head.weight.data[0] = 0
        return super().forward(codes, condition, labels)


class FarFromUniform(TransformerPrior):
    """An output layer with large weights."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        nn.init.normal_(self.head.weight, std=1)


class SamplesOtherwise(TransformerPrior):
    """`sample` of its own, with something forgotten."""

    def sample(self, batch_size: int, condition=(), labels=None, **options) -> Tensor:  # type: ignore[no-untyped-def]
        return super().sample(batch_size, condition, torch.zeros_like(labels), **options)


SEES = (
    "the code at row 0, column 0 changes the logits at row 0, column 0. .*look at shifts and masks"
)
PLANTED = {
    LeakyMask: {"causality": SEES, "cache": "bring start and step in line"},
    LeakBehindZeros: {"causality": SEES, "cache": ""},
    Plane: {"causality": SEES, "cache": ""},
    FirstSeesAll: {"causality": SEES, "cache": "at row 0, column 0"},
    Below: {"causality": "changes the logits at row 0, column 0", "cache": ""},
    Shifted: {"causality": SEES, "cache": ""},
    ShiftedByTwo: {"causality": "does not change the logits at row 0, column 1", "cache": ""},
    ConditionNotInSteps: {"cache": "Samples would not be what was learned"},
    ConditionIgnored: {
        "condition": "all codes of level 0 does not change the logits at row 0, column 0",
        "gradients": r"of \d+ weights .* condition",
    },
    ConditionInPart: {
        "condition": "the code of level 0 at row 1, column 0 does not change any logit"
    },
    ConditionNotEverywhere: {
        "condition": "level 0 does not change the logits at row 0, column 0. Feed .* every position"
    },
    LabelIgnored: {"labels": "cannot tell classes apart"},
    Unused: {"gradients": r"1 of \d+ weights receive no finite gradient, the first is forgotten"},
    ChangesItself: {"forward": "head.weight changes when the prior is used"},
    FarFromUniform: {"start": "starts far from uniform"},
    SamplesOtherwise: {"cache": "sample draws another code"},
}


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_a_planted_bug_fails_its_check_and_no_other(kind: type[TransformerPrior]) -> None:
    found = failures(make(kind))
    assert found.keys() == PLANTED[kind].keys(), found
    for name, sentence in PLANTED[kind].items():
        assert re.search(sentence, found[name])


class VectorNotEverywhere(TransformerPrior):
    """The first position does not read the vector."""

    def background(self, batch_size: int, condition: Any, labels: Any, views: Any = None) -> Tensor:
        hidden = [*condition[:-1], torch.full_like(condition[-1], torch.nan)]
        without = super().background(batch_size, hidden, labels)[:, :1]
        whole = super().background(batch_size, condition, labels)
        return torch.cat([without, whole[:, 1:]], dim=1)


def test_a_vector_must_reach_every_position_and_help() -> None:
    found = failures(make(VectorNotEverywhere, vector_size=2))
    assert found.keys() == {"vector"}
    assert "does not change the logits at row 0, column 0" in found["vector"]
    deaf = make(vector_size=2)
    nn.init.zeros_(deaf.vector.affine.weight)
    finding = check_vector_helps(deaf, random_rows(deaf, 4))
    assert not finding.passed
    assert "has not learned to use its condition" in finding.message


class ViewIgnored(TransformerPrior):
    """No position reads the view."""

    def background(self, batch_size: int, condition: Any, labels: Any, views: Any = None) -> Tensor:
        return super().background(batch_size, condition, labels)


def test_a_view_must_reach_every_position() -> None:
    found = failures(make(ViewIgnored, views=("flip",)))
    assert found.keys() == {"views", "gradients"}
    assert "changing the original to the view flip does not change the logits" in found["views"]


HEALTHY = {
    "two levels": {},
    "one code": {"level": 0, "grids": ((1, 1),), "codebook_sizes": (2,), "class_names": ("a",)},
    "one column": {"level": 0, "grids": ((9, 1),), "codebook_sizes": (300,), "class_names": ()},
    "three levels": {
        "level": 2,
        "grids": ((1, 1), (2, 2), (4, 4)),
        "codebook_sizes": (5, 600, 7),
        "label_dropout": 0.0,
    },
}
HEALTHY["one code"]["label_dropout"] = 0.0


@pytest.mark.parametrize("facts", HEALTHY.values(), ids=HEALTHY)
def test_healthy_priors_pass(facts: dict) -> None:
    assert failures(make(**facts)) == {}


def test_the_audit_does_not_depend_on_what_was_learned() -> None:
    """Attention as good as switched off, or amplified rounding, is no bug of the structure."""
    extreme = make()
    with torch.no_grad():
        for block in extreme.blocks:
            block.to_qkv.weight.mul_(1e4)
    assert failures(extreme) == {}


def test_weights_must_be_numbers() -> None:
    damaged = make()
    nn.init.constant_(damaged.head.bias, torch.nan)
    found = failures(damaged)
    assert found.keys() == {"weights"}
    assert re.match(r"1 of \d+ weights are not finite, the first head.bias", found["weights"])


def test_large_grids_are_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior.probes, "MOST_ROWS", 5)
    monkeypatch.setattr(prior.audit, "MOST_STEPS", 40)
    grids = {"grids": ((8, 8), (16, 16))}
    found = {finding.name: finding for finding in audit(make(**grids))}
    assert all(finding.passed for finding in found.values())
    assert "5 of 256 codes" in found["causality"].message
    assert "at 40 of 256 positions" in found["cache"].message
    assert failures(make(LeakyMask, **grids)).keys() == {"causality", "cache"}


LONG = 512  # the bugs below show at more positions only
in_window = prior.attention.attend_in_window
sdpa, cached = F.scaled_dot_product_attention, KVCache.attend


def window_off_by(number: int) -> Callable:
    return lambda q, k, v, window: in_window(q, k, v, window + number * (q.shape[-2] > LONG))


def sees_the_next(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, attn_mask=None):  # type: ignore[no-untyped-def]
    """A mask one diagonal too high."""
    if is_causal and q.shape[-2] > LONG:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)
        return sdpa(q, k, v, attn_mask=attn_mask)
    return sdpa(q, k, v, is_causal=is_causal, attn_mask=attn_mask)


def forgets_the_own(cache: KVCache, slots: Slots, q: Tensor, k: Tensor, v: Tensor):  # type: ignore[no-untyped-def]
    """A cache that reads before it writes; here what it reads was there before, but for one key."""
    at = slots.rows
    position = at.stop - 1 if isinstance(at, slice) else int(at[-1] % cache.length)
    if position > LONG:
        k = cache.keys[:, :, position - k.shape[2] : position]
    return cached(cache, slots, q, k, v)


OFF = "attention is off by .* row"
SDPA = "scaled_dot_product_attention"
WRONG_WHEN_LONG = {  # what is replaced, by what, rows of the window, and what is found
    "one key too many": (
        (prior.attention, "attend_in_window", window_off_by(1)),
        (4, f"{OFF} 4, column 1 of 1024 .window 128"),
    ),
    "one key too few": (
        (prior.attention, "attend_in_window", window_off_by(-1)),
        (4, f"{OFF} 4, column 0 of 1024 .window 128"),
    ),
    "the next key": (
        (F, SDPA, sees_the_next),
        (0, f"{OFF} 0, column 0 of 1024 .window none"),
    ),
    "the cache": ((KVCache, "attend", forgets_the_own), (0, "attention through the cache is off")),
}


@pytest.mark.parametrize(("bug", "expected"), WRONG_WHEN_LONG.values(), ids=WRONG_WHEN_LONG)
def test_attention_that_is_wrong_at_the_real_length_alone(
    bug: tuple, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large prior is seen on a small grid by all checks but one."""
    monkeypatch.setattr(prior.probes, "WORK", 1e7)
    rows, sentence = expected
    torch.manual_seed(0)
    network = TransformerConfig(width=32, num_layers=1, num_heads=2, attention_rows=rows)
    config = TransformerPriorConfig(
        level=0, grids=((32, 32),), codebook_sizes=(11,), network=network
    )
    large = TransformerPrior(config)
    assert prior.probes.fresh_copy(large, noise=True).config.num_positions < LONG
    assert failures(large) == {}
    monkeypatch.setattr(*bug)
    found = failures(large)
    assert found.keys() == {"attention"}
    assert re.search(sentence, found["attention"])


def test_attention_may_not_see_hidden_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a leak too small to tell from rounding in single precision."""

    def leaky(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:  # type: ignore[no-untyped-def]
        return attend(q, k, v, **options) + 1e-8 * v.sum(dim=2, keepdim=True)

    monkeypatch.setattr(prior.audit, "attend", leaky)
    found = check_attention(make(level=0, grids=((8, 8),), codebook_sizes=(11,)))
    assert not found.passed
    assert "attention is off by" in found.message


def test_the_audit_changes_nothing() -> None:
    """Neither weights nor random numbers: a training gives the same bits with and without it."""
    healthy = make().train()
    weights = {name: weight.clone() for name, weight in healthy.state_dict().items()}
    torch_numbers, numpy_numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    stop_if_unsound(healthy, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), torch_numbers)
    assert np.array_equal(np.random.get_state()[1], numpy_numbers)
    assert all(torch.equal(weights[name], w) for name, w in healthy.state_dict().items())
    assert healthy.training
    assert all(parameter.grad is None for parameter in healthy.parameters())


def test_an_unsound_prior_is_not_trained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior.training, "make_prior", LeakyMask)
    network = TransformerConfig(width=32, num_layers=2, num_heads=2, num_condition_layers=1)
    settings = {"codes": str(run / "codes"), "output_dir": str(tmp_path / "p"), "num_steps": 2}
    config = TrainPriorConfig(level="bottom", transformer=network, **settings)
    with pytest.raises(UserError, match="LeakyMask of level 1 fails the check 'causality'"):
        prior.training.train_prior(config)
    assert not (tmp_path / "p").exists()


# The command, and bugs in what is on disk.


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages that had time to learn something. Tests must not change it."""
    x = tmp_path_factory.mktemp("trained") / "x"
    tiny = ("--config", "tiny", "--checkpoint-every", 1000, "--picture-every", 0)
    images, vqvae, codes = ("--data.path", photos), ("--vqvae", x / "vqvae"), x / "codes"
    longer = ("--num-steps", 150, "--validate-every", 50)
    command("train", *tiny, *longer, *images, "--output-dir", x / "vqvae")
    command("extract", *vqvae, *images, "--output-dir", codes)
    longer = ("--num-steps", 100, "--validate-every", 25, "--learning-rate", 0.01)
    priors = [x / "prior_0", x / "prior_1"]
    for level, folder in enumerate(priors):
        train = ("train-prior", *tiny, *longer, "--codes", codes, "--level", level)
        command(*train, "--output-dir", folder)
    command("assemble", *vqvae, "--priors", *priors, "--output-dir", x / "pipeline")
    return x


@pytest.fixture
def copy_of_trained(trained: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return shutil.copytree(trained, tmp_path / "x")


def examined(x: Path, *names: str) -> dict[str, Finding]:
    """What the doctor finds about these parts of a run; about all if not given."""
    names = names or ("vqvae", "prior_0", "prior_1", "codes")
    single = {name: str(x / name) for name in names if not name.startswith("prior")}
    priors = tuple(str(x / name) for name in names if name.startswith("prior"))
    config = DoctorConfig(priors=priors, **single)
    return {finding.name: finding for finding in examine(**load(config))}


def failed(x: Path, *names: str) -> dict[str, str]:
    found = examined(x, *names).values()
    return {finding.name: finding.message for finding in found if not finding.passed}


def test_a_healthy_pipeline_passes_all(trained: Path) -> None:
    parts = ("--pipeline", trained / "pipeline", "--codes", trained / "codes")
    said, _, following = vqvae2("doctor", *parts).stdout.partition("Next:")
    assert "vqvae2 sample --pipeline" in following
    *checks, empty, summary = said.splitlines()
    assert all(line.startswith("pass  ") for line in checks)
    assert (empty, summary) == ("", f"All {len(checks)} checks passed.")
    names = [line.removeprefix("pass  ").split(":")[0] for line in checks]
    of_a_prior = ["weights", "forward", "causality", "cache", "condition", "labels", "gradients"]
    of_a_prior += ["start", "attention", "cache on real codes", "condition helps", "likelihood"]
    of_the_top = [name for name in of_a_prior if not name.startswith("condition")]
    assert names == [
        *("files", "parts", "round trip, top", "round trip, bottom", "codes", "extraction"),
        *(f"prior of level 0, {name}" for name in of_the_top),
        *(f"prior of level 1, {name}" for name in of_a_prior),
    ]


def test_failures_decide_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After 12 steps a prior knows less than the frequencies of the codes."""
    command("doctor", "--priors", run / "prior_0", "--codes", run / "codes", code=1)
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("FAIL"))
    assert line.startswith("FAIL  prior of level 0, likelihood: ")
    assert "Train it longer" in line
    assert "1 of 12 checks failed." in said
    assert "Not checked: the autoencoder (give --pipeline, or --vqvae)." in said
    training = best_validation(run / "prior_0")
    costs, by_frequency = re.findall(r"costs (.*) bits, by frequency alone ([\d.]+)", line)[0]
    assert float(costs) == pytest.approx(training["bits_per_code"], abs=0.005)  # perhaps in bf16
    assert by_frequency == f"{training['unigram_bits']:.3f}"


def test_without_codes_the_pipeline_s_own_figures_count(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("doctor", "--pipeline", run / "pipeline", code=1)
    assert "FAIL  prior_0, likelihood when it was trained: " in capsys.readouterr().out


def test_fewer_parts_fewer_checks(trained: Path) -> None:
    assert examined(trained, "vqvae").keys() == {"round trip, top", "round trip, bottom"}
    assert examined(trained, "codes").keys() == {"codes"}
    alone = examined(trained, "prior_1")
    assert {"prior of level 1, causality", "prior of level 1, condition"} < alone.keys()
    assert all(finding.passed for finding in alone.values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "nothing to check: give --pipeline DIR"),
        (("--pipeline", "pipeline", "--vqvae", "vqvae"), "--pipeline replaces --vqvae"),
        (("--vqvae", "vqvae", "--data.path", "."), "give --codes DIR and the autoencoder too"),
        (("--codes", "codes", "--data.validation-path", "."), "without --data.path"),
        (("--priors", "vqvae"), "a prior .* was expected"),
    ],
)
def test_wrong_combinations_are_refused(
    trained: Path, flags: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command("doctor", *(trained / flag if flag[0] not in "-." else flag for flag in flags), code=2)
    assert re.search(sentence, capsys.readouterr().err)


def test_another_encoders_hash(copy_of_trained: Path) -> None:
    edit_manifest(copy_of_trained / "codes", encoder_hash="0123456789abcdef")
    found = failed(copy_of_trained)
    assert found.keys() == {"parts"}
    both = "the code dataset holds codes of the encoder 0123456789ab, but the autoencoder is "
    assert both in found["parts"]
    assert "Extract codes with this autoencoder" in found["parts"]


def test_other_codes(copy_of_trained: Path) -> None:
    """The same encoder's, of other images: one label is another."""
    codes = copy_of_trained / "codes"
    before = read_manifest(codes).codes_hash
    shard = codes / "train" / "00000.parquet"
    edit_shard(shard, lambda c: c["label"].__setitem__(0, 2 - c["label"][0]))
    after = read_manifest(codes).codes_hash
    found = failed(copy_of_trained)
    assert found.keys() == {"parts"}
    for level in range(2):
        one = f"the prior of level {level} was trained on the code dataset {before[:12]}"
        assert f"{one}, but the code dataset is {after[:12]}" in found["parts"]


def test_another_encoder(copy_of_trained: Path) -> None:
    """Its weights were changed after the extraction: hashes and codes say so."""
    model = VQVAE2.from_pretrained(copy_of_trained / "vqvae")
    with torch.no_grad():
        for weight in model.encoders.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(copy_of_trained / "vqvae")
    found = failed(copy_of_trained)
    assert found.keys() == {"parts", "extraction"}
    assert "extract again" in found["extraction"]


def test_a_prior_of_other_grids(copy_of_trained: Path) -> None:
    """What it would make of the codes is not asked: it cannot read them."""
    make(class_names=("bag", "coat", "dress")).save_pretrained(copy_of_trained / "prior_1")
    found = examined(copy_of_trained)
    assert [name for name, finding in found.items() if not finding.passed] == ["parts"]
    shown = "the prior of level 1 has the grids 2 x 3 of 17, 4 x 6 of 11, but the autoencoder has"
    assert shown in found["parts"].message
    assert "prior of level 1, causality" in found
    assert "prior of level 1, likelihood" not in found


def rewrite(x: Path, split: str, change: Callable[[dict], object]) -> None:
    """Change a split's only shard, as if it had been extracted and the priors trained so."""
    (path,) = (x / "codes" / split).glob("*.parquet")
    edit_shard(path, change)
    codes_hash = read_manifest(x / "codes").codes_hash
    for folder in x.glob("prior_*"):
        model = load_prior(folder)
        model.config = replace(model.config, codes_hash=codes_hash)
        model.save_pretrained(folder)


def test_truncated_codes(copy_of_trained: Path) -> None:
    """Codes that came back from a float one lower, some of them: all are still in range."""

    def truncate(columns: dict) -> None:
        columns["codes_1"] = [[k - k % 2 for k in row] for row in columns["codes_1"]]

    rewrite(copy_of_trained, "train", truncate)
    found = failed(copy_of_trained, "vqvae", "codes")
    assert found.keys() == {"extraction"}
    sentence = r"0 of 92 top, \d+ of 368 bottom codes differ, the first of train/.*png"
    assert re.search(sentence, found["extraction"])


def test_rows_of_other_images(copy_of_trained: Path) -> None:
    """The levels of different images side by side. (Labels of other rows may cost, too.)"""

    def rotate(columns: dict) -> None:
        columns["codes_0"] = columns["codes_0"][3:] + columns["codes_0"][:3]

    for split in ("train", "validation"):
        rewrite(copy_of_trained, split, rotate)
    assert failed(copy_of_trained).keys() >= {"extraction", "prior of level 1, condition helps"}


def test_the_condition_must_help(copy_of_trained: Path) -> None:
    """A condition network of zeros could learn, so it passes the structural checks; but has not."""
    model = TransformerPrior.from_pretrained(copy_of_trained / "prior_1")
    nn.init.zeros_(model.condition.norm.weight)
    model.save_pretrained(copy_of_trained / "prior_1")
    found = failed(copy_of_trained)
    assert found.keys() == {"prior of level 1, condition helps"}
    assert "has not learned to use its condition" in found["prior of level 1, condition helps"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda c: c["codes_0"][3].__setitem__(0, 16),
            r"codes_0 ranges from \d+ to 16, but there are 16 codes",
        ),
        (
            lambda c: c["id"].__setitem__(5, c["id"][4]),
            r"2 rows, the first of them row 4, have an id and view that another row",
        ),
    ],
    ids=["out of range", "a row twice"],
)
def test_broken_code_datasets(
    copy_of_trained: Path, change: Callable[[dict], object], sentence: str
) -> None:
    rewrite(copy_of_trained, "train", change)
    found = failed(copy_of_trained)
    assert found.keys() == {"codes"}
    assert re.search(sentence, found["codes"])


def test_the_images_may_be_named_or_gone(
    copy_of_trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = copy_of_trained / "codes" / "extract_config.yaml"
    settings = yaml.safe_load(record.read_text())
    settings["data"]["path"] = str(tmp_path / "gone")
    record.write_text(yaml.safe_dump(settings))
    assert "extraction" not in examined(copy_of_trained, "vqvae", "codes")
    parts = ("--vqvae", copy_of_trained / "vqvae", "--codes", copy_of_trained / "codes")
    command("doctor", *parts)
    assert "Not checked: whether images still get the codes" in capsys.readouterr().out
    (tmp_path / "gone").mkdir()  # there, but empty
    command("doctor", *parts)
    assert "Not checked: whether images still get the codes" in capsys.readouterr().out
    command("doctor", *parts, "--data.path", photos)
    assert "pass  extraction" in capsys.readouterr().out
    (tmp_path / "others").mkdir()
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "others" / "unknown.png")
    command("doctor", *parts, "--data.path", tmp_path / "others", code=1)
    assert "FAIL  extraction: none of the" in capsys.readouterr().out


def test_codes_are_encoded_again_in_the_precision_that_made_them(
    copy_of_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, original, seen = copy_of_trained / "codes" / "extract_config.yaml", encode_lanes, []

    def encode(*given: Any, bf16: bool) -> Any:
        seen.append(bf16)
        return original(*given)

    monkeypatch.setattr("pipelines.commands.doctor.encode_lanes", encode)
    examined(copy_of_trained, "vqvae", "codes")
    settings = yaml.safe_load(record.read_text())
    settings["mixed_precision"] = "bf16"
    record.write_text(yaml.safe_dump(settings))
    examined(copy_of_trained, "vqvae", "codes")
    assert (False in seen, True in seen) == (True, True)


@pytest.fixture(scope="module")
def views(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of the views original, flip and top_left."""
    codes = tmp_path_factory.mktemp("views") / "codes"
    given = ("--vqvae", run / "vqvae", "--data.path", photos, "--shard-size", 50)
    command("extract", *given, "--views", "original", "flip", "top_left", "--output-dir", codes)
    return codes


def settings_for(codes: Path) -> TrainPriorConfig:
    return TrainPriorConfig(codes=str(codes), level="bottom", output_dir="x")


def test_rows_of_several_views_do_not_alarm(views: Path) -> None:
    """Nothing is held out, so that the checks read training rows: mirrored ones, too."""
    manifest = read_manifest(views)
    rows = {split: CodeDataset(views, manifest, split) for split in SPLITS}
    rows["validation"] = Subset(rows["validation"], [])
    for known in (("flip", "top_left"), ("top_left",)):
        config = dataclasses.replace(prior_config(settings_for(views), manifest), views=known)
        prior = fresh_copy(make_prior(config), noise=True)
        found = list(examine_prior(prior, manifest, rows))
        assert [finding.passed for finding in found if "cache" in finding.name] == [True, True]


def test_pictures_are_drawn_beside_original_rows_alone(
    views: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again nothing is held out."""
    nothing = dataclasses.replace(read_manifest(views), validation=())
    monkeypatch.setattr("pipelines.pictures.read_manifest", lambda folder: nothing)
    read, seen = CodeDataset.__getitems__, []

    def read_and_note(dataset: CodeDataset, rows: Any) -> dict[str, Any]:
        batch = read(dataset, rows)
        seen.append(batch["views"])
        return batch

    monkeypatch.setattr(CodeDataset, "__getitems__", read_and_note)
    prior = make_prior(prior_config(settings_for(views), nothing)).eval()
    make_sample_drawer(settings_for(views), str(run / "vqvae"))(prior)
    assert [(len(batch), batch.any().item()) for batch in seen] == [(32, False)]


def test_a_training_of_an_earlier_version_goes_on_as_it_was(views: Path, tmp_path: Path) -> None:
    given = ("--config", "tiny", "--codes", views, "--level", "top", "--output-dir", tmp_path)
    before = ("--no-view-conditional", "--transformer.no-reads-neighbours")
    command("train-prior", *given, *before, "--num-steps", 2)
    record = tmp_path / "train_config.yaml"
    settings = yaml.safe_load(record.read_text())
    del settings["view_conditional"], settings["transformer"]["reads_neighbours"]
    record.write_text(yaml.safe_dump(settings))
    for number in (4, 6):
        command("train-prior", *given, "--num-steps", number)
    config = load_prior(tmp_path).config
    assert isinstance(config, TransformerPriorConfig)
    assert (config.views, config.network.reads_neighbours) == ((), False)


def test_views_are_no_repeats_and_are_encoded_as_they_were(
    run: Path, views: Path, tmp_path: Path
) -> None:
    codes = shutil.copytree(views, tmp_path / "codes")
    shutil.copytree(run / "vqvae", tmp_path / "vqvae")
    command("codes", "verify", "--codes", codes)
    assert failed(tmp_path, "vqvae", "codes") == {}

    def every_view_with_the_next_ones_codes(columns: dict) -> None:
        columns["codes_1"] = columns["codes_1"][1:] + columns["codes_1"][:1]

    edit_shard(codes / "train" / "00000.parquet", every_view_with_the_next_ones_codes)
    assert failed(tmp_path, "vqvae", "codes").keys() == {"extraction"}


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "ema"},
        {"kind": "gradient"},
        {"kind": "cosine"},
        {"kind": "fsq"},
        {"kind": "fsq", "fsq_levels": (5, 4, 3, 2)},
    ],
)
def test_all_codes_survive_a_round_trip(quantizer: dict) -> None:
    torch.manual_seed(0)
    config, size, dim = QuantizerConfig(**quantizer), 512, 8
    if config.kind == "fsq":
        size, dim = int(np.prod(config.fsq_levels)), len(config.fsq_levels)
    finding = check_round_trip(make_quantizer(config, size, dim), "top")
    assert finding.passed
    assert f"all {size} codes" in finding.message


def test_codes_that_do_not_come_back_are_named() -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer(QuantizerConfig(kind="ema"), 32, 2)
    assert isinstance(quantizer, CodebookQuantizer)
    quantizer.codebook[20] = quantizer.codebook[3]
    found = check_round_trip(quantizer, "top")
    assert not found.passed
    assert "1 of 32 codes come back as other codes (20 as 3)" in found.message
    assert not check_round_trip(quantizer, "top", 32).passed
    few = check_round_trip(quantizer, "top", 31)
    assert few.passed
    assert "all images have only 31 features, too few images to fill it" in few.message
    quantizer.codebook.round_()
    assert not check_round_trip(quantizer, "top").passed


def test_lookup_must_give_what_the_decoder_was_trained_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer = make_quantizer(QuantizerConfig(kind="fsq"), 512, 3)
    lookup, features = quantizer.lookup, quantizer.features_of(torch.arange(512)[None, :, None])
    monkeypatch.setattr(quantizer, "features_of", lambda codes: features)
    monkeypatch.setattr(quantizer, "lookup", lambda codes: 2 * lookup(codes))
    found = check_round_trip(quantizer, "top")
    assert "another embedding than quantizing does" in found.message


def test_a_pipeline_without_a_level_fails(
    copy_of_trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = copy_of_trained / "pipeline" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "priors": ["prior_0"]}))
    command("doctor", "--pipeline", copy_of_trained / "pipeline", code=1)
    levels = "the priors are of the levels [0], but the autoencoder needs [0, 1]"
    assert f"FAIL  parts: {levels}" in capsys.readouterr().out
