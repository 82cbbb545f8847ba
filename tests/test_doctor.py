"""The audit catches what it is for: every bug that is planted here fails the checks meant for it and no other, and healthy parts pass all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prior.attention
import prior.audit
import prior.probes
import prior.training
from pipelines.commands.doctor import check_round_trip, examine, load
from pipelines.config import DoctorConfig
from prior import TrainPriorConfig, TransformerConfig, TransformerPrior, TransformerPriorConfig
from prior.attention import KVCache, attend
from prior.audit import audit, check_attention, stop_if_unsound
from prior.base import Prior
from prior.manifest import read_manifest
from tests.conftest import command, edit_manifest, edit_shard, vqvae2
from vqvae2 import VQVAE2
from vqvae2.common.checks import Finding
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
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
    return kind(
        TransformerPriorConfig(
            **{**FACTS, **facts},
            network=TransformerConfig(width=32, num_layers=2, num_heads=2, num_condition_layers=1),
        )
    )


def failures(asked: Prior) -> dict[str, str]:
    return {finding.name: finding.message for finding in audit(asked) if not finding.passed}


# Bugs of priors, each with the checks that it fails. What is wrong in forward alone makes the cached steps differ from it, too.


class LeakyMask(TransformerPrior):
    """Attention sees the future."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.causal = False


class LeakBehindZeros(LeakyMask):
    """The same behind an output layer that starts at zero, which gives the same logits for everything."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        nn.init.zeros_(self.head.weight)


class Plane(TransformerPrior):
    """A one-hot input whose whole plane is set: every position knows which codes occur (rosinality-style priors of vvvm23/vqvae-2)."""

    def forward(self, codes: Tensor, condition=(), labels=None) -> Tensor:  # type: ignore[no-untyped-def]
        bag = self.embedding(codes.flatten(1)).mean(dim=1)
        return super().forward(codes, condition, labels) + self.head(bag)[:, :, None, None]


class FirstSeesAll(TransformerPrior):
    """A first position with all keys masked attends to all of them equally (kamenbliznashki/generative_models)."""

    def forward(self, codes: Tensor, condition=(), labels=None) -> Tensor:  # type: ignore[no-untyped-def]
        logits = super().forward(codes, condition, labels)
        mean = self.head(self.embedding(codes.flatten(1)).mean(dim=1))[:, :, None, None]
        return logits + F.pad(mean, (0, logits.shape[3] - 1, 0, logits.shape[2] - 1))


class Shifted(TransformerPrior):
    """The input is shifted by another number of positions than one."""

    by = 0

    def forward(self, codes: Tensor, condition=(), labels=None) -> Tensor:  # type: ignore[no-untyped-def]
        flat = codes.flatten(1)
        x = self.embedding(
            F.pad(flat[:, : flat.shape[1] - self.by], (self.by, 0), value=self.codebook_size)
        ) + self.background(len(codes), condition, labels)
        for block in self.blocks:
            x = block(x, self.angles)
        return self.head(self.norm(x)).transpose(1, 2).unflatten(2, codes.shape[1:])


class ShiftedByTwo(Shifted):
    """Position t reads the codes up to t - 2."""

    by = 2


class ConditionNotInSteps(TransformerPrior):
    """Sampling forgets the condition."""

    def start(self, batch_size: int, condition, labels, **options):  # type: ignore[no-untyped-def]
        return super().start(
            batch_size, [torch.zeros_like(codes) for codes in condition], labels, **options
        )


class ConditionIgnored(TransformerPrior):
    """The condition network is there and not used."""

    def background(self, batch_size: int, condition, labels: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        assert self.labels is not None
        return self.positions().expand(batch_size, -1, -1) + self.labels(labels)[:, None]


class ConditionInPart(TransformerPrior):
    """Of the coarser level only the first row is used."""

    def background(self, batch_size: int, condition, labels: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        return super().background(
            batch_size, [codes[:, :1].expand_as(codes) for codes in condition], labels
        )


class ConditionNotEverywhere(TransformerPrior):
    """The first position does not hear of the condition."""

    def background(self, batch_size: int, condition, labels: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        all_of_it = super().background(batch_size, condition, labels)
        without = super().background(
            batch_size, [torch.zeros_like(codes) for codes in condition], labels
        )
        return torch.cat([without[:, :1], all_of_it[:, 1:]], dim=1)


class LabelIgnored(TransformerPrior):
    """All classes are the same one."""

    def background(self, batch_size: int, condition, labels: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        assert labels is not None
        return super().background(batch_size, condition, torch.zeros_like(labels))


class Unused(TransformerPrior):
    """A weight that nothing reads."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        self.forgotten = nn.Parameter(torch.ones(3))


class ChangesItself(TransformerPrior):
    """A mask that is written into the weight at every forward."""

    def forward(self, codes: Tensor, condition=(), labels=None) -> Tensor:  # type: ignore[no-untyped-def]
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


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {
            "level": 0,
            "grids": ((1, 1),),
            "codebook_sizes": (2,),
            "class_names": ("a",),
            "label_dropout": 0.0,
        },
        {"level": 0, "grids": ((9, 1),), "codebook_sizes": (300,), "class_names": ()},
        {
            "level": 2,
            "grids": ((1, 1), (2, 2), (4, 4)),
            "codebook_sizes": (5, 600, 7),
            "label_dropout": 0.0,
        },
    ],
    ids=["two levels", "one code", "one column", "three levels"],
)
def test_healthy_priors_pass(facts: dict) -> None:
    assert failures(make(**facts)) == {}


def test_the_audit_does_not_depend_on_what_was_learned() -> None:
    """An attention that is as good as switched off, or blows up rounding, is no bug of the structure; weights that are no numbers are."""
    extreme = make()
    with torch.no_grad():
        for block in extreme.blocks:
            block.to_qkv.weight.mul_(1e4)
    assert failures(extreme) == {}
    nn.init.constant_(extreme.head.bias, torch.nan)
    found = failures(extreme)
    assert found.keys() == {"weights"}
    assert re.match(
        r"1 of \d+ weights are not finite, the first head.bias",
        found["weights"],
    )


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
in_window, sdpa, cached = (
    prior.attention.attend_in_window,
    F.scaled_dot_product_attention,
    KVCache.attend,
)


def window_off_by(number: int) -> Callable:
    return lambda q, k, v, window: in_window(q, k, v, window + number * (q.shape[-2] > LONG))


def sees_the_next(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, attn_mask: Tensor | None = None
) -> Tensor:
    """A mask one diagonal too high."""
    if is_causal and q.shape[-2] > LONG:
        return sdpa(
            q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)
        )
    return sdpa(q, k, v, is_causal=is_causal, attn_mask=attn_mask)


def forgets_the_own(
    cache: KVCache, position: int | Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """A cache that reads before it writes; here what it reads was there before, but for one key."""
    if isinstance(position, int) and position > LONG:
        k = cache.keys[:, :, position - 1 : position]
    return cached(cache, position, q, k, v)


@pytest.mark.parametrize(
    ("place", "name", "bug", "rows", "sentence"),
    [
        (
            prior.attention,
            "attend_in_window",
            window_off_by(1),
            4,
            "attention is off by .* row 4, column 1 of 1024 .window 128",
        ),
        (
            prior.attention,
            "attend_in_window",
            window_off_by(-1),
            4,
            "attention is off by .* row 4, column 0 of 1024 .window 128",
        ),
        (
            F,
            "scaled_dot_product_attention",
            sees_the_next,
            0,
            "attention is off by .* row 0, column 0 of 1024 .window none",
        ),
        (KVCache, "attend", forgets_the_own, 0, "attention through the cache is off by"),
    ],
    ids=["one key too many", "one key too few", "the next key", "the cache"],
)
def test_attention_that_is_wrong_at_the_real_length_alone(  # type: ignore[no-untyped-def]
    place, name: str, bug: Callable, rows: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large prior is seen on a small grid by all checks but one."""
    monkeypatch.setattr(prior.probes, "WORK", 1e7)
    torch.manual_seed(0)
    network = TransformerConfig(width=32, num_layers=1, num_heads=2, attention_rows=rows)
    asked = TransformerPrior(
        TransformerPriorConfig(level=0, grids=((32, 32),), codebook_sizes=(11,), network=network)
    )
    assert prior.probes.fresh_copy(asked, noise=True).config.num_positions < LONG
    assert failures(asked) == {}
    monkeypatch.setattr(place, name, bug)
    found = failures(asked)
    assert found.keys() == {"attention"}
    assert re.search(sentence, found["attention"])


def test_attention_may_not_see_hidden_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a leak too small to tell from rounding in single precision."""
    asked = make(level=0, grids=((8, 8),), codebook_sizes=(11,))
    monkeypatch.setattr(
        prior.audit,
        "attend",
        lambda q, k, v, **options: attend(q, k, v, **options) + 1e-8 * v.sum(dim=2, keepdim=True),
    )
    found = check_attention(asked)
    assert found is not None
    assert not found.passed
    assert "attention is off by" in found.message


def test_the_audit_changes_nothing() -> None:
    """Neither weights nor random numbers: a training gives the same bits with and without it."""
    healthy = make().train()
    before, numbers, weights = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        {n: w.clone() for n, w in healthy.state_dict().items()},
    )
    stop_if_unsound(healthy, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert all(torch.equal(weights[name], w) for name, w in healthy.state_dict().items())
    assert healthy.training
    assert all(parameter.grad is None for parameter in healthy.parameters())


def test_an_unsound_prior_is_not_trained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prior.training, "make_prior", LeakyMask)
    network = TransformerConfig(width=32, num_layers=2, num_heads=2, num_condition_layers=1)
    config = TrainPriorConfig(
        codes=str(run / "codes"),
        level="bottom",
        output_dir=str(tmp_path / "p"),
        transformer=network,
        num_steps=2,
    )
    with pytest.raises(
        UserError,
        match=r"LeakyMask of level 1 fails the check 'causality': .* changes the logits at",
    ):
        prior.training.train_prior(config)
    assert not (tmp_path / "p").exists()


# The command, and bugs in what is on disk.


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage of the tiny recipe that had time to learn something. Tests must not change it."""
    x = tmp_path_factory.mktemp("trained") / "x"
    longer = ("--config", "tiny", "--checkpoint-every", "1000", "--picture-every", "0")
    command(
        "train",
        *longer,
        "--num-steps",
        "150",
        "--validate-every",
        "50",
        "--data.path",
        photos,
        "--output-dir",
        x / "vqvae",
    )
    command("extract", "--vqvae", x / "vqvae", "--data.path", photos, "--output-dir", x / "codes")
    for level in range(2):
        options = ("--num-steps", "100", "--validate-every", "25", "--learning-rate", "0.01")
        command(
            "train-prior",
            *longer,
            *options,
            "--codes",
            x / "codes",
            "--level",
            level,
            "--output-dir",
            x / f"prior_{level}",
        )
    command(
        "assemble",
        "--vqvae",
        x / "vqvae",
        "--priors",
        x / "prior_0",
        x / "prior_1",
        "--output-dir",
        x / "pipeline",
    )
    return x


@pytest.fixture
def copy_of_trained(trained: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return shutil.copytree(trained, tmp_path / "x")


def examined(x: Path, **parts) -> dict[str, Finding]:  # type: ignore[no-untyped-def]
    config = DoctorConfig(
        **(
            parts
            or {
                "vqvae": str(x / "vqvae"),
                "priors": (str(x / "prior_0"), str(x / "prior_1")),
                "codes": str(x / "codes"),
            }
        )
    )
    return {finding.name: finding for finding in examine(**load(config))}


def failed(x: Path, **parts) -> dict[str, str]:  # type: ignore[no-untyped-def]
    return {
        name: finding.message
        for name, finding in examined(x, **parts).items()
        if not finding.passed
    }


def test_a_healthy_pipeline_passes_all(trained: Path) -> None:
    said = vqvae2(
        "doctor", "--pipeline", trained / "pipeline", "--codes", trained / "codes"
    ).stdout.splitlines()
    *checks, empty, summary = said
    assert all(line.startswith("pass  ") for line in checks)
    assert (empty, summary) == ("", f"All {len(checks)} checks passed.")
    names = [line.removeprefix("pass  ").split(":")[0] for line in checks]
    structural = [
        "weights",
        "forward",
        "causality",
        "cache",
        "condition",
        "labels",
        "gradients",
        "start",
        "attention",
    ]
    learned = ["cache on real codes", "condition helps", "likelihood"]
    assert names == [
        *("parts", "round trip, top", "round trip, bottom", "codes", "extraction"),
        *(
            f"prior of level 0, {name}"
            for name in structural + learned
            if not name.startswith("condition")
        ),
        *(f"prior of level 1, {name}" for name in structural + learned),
    ]


def test_failures_decide_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After 12 steps a prior knows less than the frequencies of the codes."""
    command("doctor", "--priors", run / "prior_0", "--codes", run / "codes", code=1)
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("FAIL"))
    assert line.startswith("FAIL  prior of level 0, likelihood: a code costs ")
    assert "Train it longer" in line
    assert "1 of 12 checks failed." in said
    assert "Not checked: the autoencoder (give --pipeline, or --vqvae)." in said


def test_fewer_parts_fewer_checks(trained: Path) -> None:
    assert examined(trained, vqvae=str(trained / "vqvae")).keys() == {
        "round trip, top",
        "round trip, bottom",
    }
    assert examined(trained, codes=str(trained / "codes")).keys() == {"codes"}
    alone = examined(trained, priors=(str(trained / "prior_1"),))
    assert {"prior of level 1, causality", "prior of level 1, condition"} < alone.keys()
    assert all(finding.passed for finding in alone.values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "nothing to check: give --pipeline DIR"),
        (
            ("--pipeline", "pipeline", "--vqvae", "vqvae"),
            "--pipeline replaces --vqvae and --priors",
        ),
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
    assert (
        "the code dataset holds codes of the encoder 0123456789ab, but the autoencoder is "
        in found["parts"]
    )
    assert "Extract codes with this autoencoder" in found["parts"]


def test_other_codes(copy_of_trained: Path) -> None:
    """The same encoder's, of other images: one label is another."""
    before = read_manifest(copy_of_trained / "codes").codes_hash
    edit_shard(
        copy_of_trained / "codes" / "train" / "00000.parquet",
        lambda c: c["label"].__setitem__(0, 2 - c["label"][0]),
    )
    after = read_manifest(copy_of_trained / "codes").codes_hash
    found = failed(copy_of_trained)
    assert found.keys() == {"parts"}
    for level in range(2):
        assert (
            f"the prior of level {level} was trained on the code dataset {before[:12]}, but the code dataset is {after[:12]}" in found["parts"]
        )


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
    assert (
        "the prior of level 1 has the grids 2 x 3 of 17, 4 x 6 of 11, but the autoencoder has"
        in found["parts"].message
    )
    assert "prior of level 1, causality" in found
    assert "prior of level 1, likelihood" not in found


def rewrite(x: Path, split: str, change: Callable[[dict], object]) -> None:
    """Change a split's only shard, as if it had been extracted so and the priors had been trained on it."""
    (path,) = (x / "codes" / split).glob("*.parquet")
    edit_shard(path, change)
    for config in x.glob("prior_*/config.json"):
        write_json(
            config, {**read_json(config), "codes_hash": read_manifest(x / "codes").codes_hash}
        )


def test_truncated_codes(copy_of_trained: Path) -> None:
    """Codes that went through a float and came back one lower, some of them: every number is still in range."""
    rewrite(
        copy_of_trained,
        "train",
        lambda c: c.update(codes_1=[[k - (k % 8 == 7) for k in row] for row in c["codes_1"]]),
    )
    found = failed(
        copy_of_trained, vqvae=str(copy_of_trained / "vqvae"), codes=str(copy_of_trained / "codes")
    )
    assert found.keys() == {"extraction"}
    assert re.search(
        r"0 of 92 top, \d+ of 368 bottom codes differ, the first of train/.*png",
        found["extraction"],
    )


def test_rows_of_other_images(copy_of_trained: Path) -> None:
    """The levels of different images side by side."""
    for split in ("train", "validation"):
        rewrite(
            copy_of_trained, split, lambda c: c.update(codes_0=c["codes_0"][3:] + c["codes_0"][:3])
        )
    assert failed(copy_of_trained).keys() >= {
        "extraction",
        "prior of level 1, condition helps",
    }  # and labels that are of other rows may cost, too


def test_the_condition_must_help(copy_of_trained: Path) -> None:
    """A condition network of zeros passes every structural check, for it could learn; but what was trained has not."""
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
            r"codes_0 reaches from \d+ to 16, but there are 16 codes",
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
    record.write_text(record.read_text().replace(str(photos), str(tmp_path / "gone")))
    parts = {"vqvae": str(copy_of_trained / "vqvae"), "codes": str(copy_of_trained / "codes")}
    assert "extraction" not in examined(copy_of_trained, **parts)
    arguments = ("doctor", "--vqvae", parts["vqvae"], "--codes", parts["codes"])
    command(*arguments)
    assert (
        "Not checked: whether images still get the codes that are stored" in capsys.readouterr().out
    )
    command(*arguments, "--data.path", photos)
    assert "pass  extraction" in capsys.readouterr().out
    (tmp_path / "others").mkdir()
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "others" / "unknown.png")
    command(*arguments, "--data.path", tmp_path / "others", code=1)
    assert "FAIL  extraction: none of the" in capsys.readouterr().out


def test_views_are_no_repeats_and_are_encoded_as_they_were(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    extract = (
        "extract",
        "--vqvae",
        run / "vqvae",
        "--data.path",
        photos,
        "--output-dir",
        tmp_path / "codes",
    )
    command(*extract, "--views", "original", "flip", "top_left", "--shard-size", 50)
    command("codes", "verify", "--codes", tmp_path / "codes")
    assert failed(tmp_path, vqvae=str(run / "vqvae"), codes=str(tmp_path / "codes")) == {}
    first = tmp_path / "codes" / "train" / "00000.parquet"
    edit_shard(
        first, lambda c: c.update(codes_1=c["codes_1"][1:] + c["codes_1"][:1])
    )  # every view with the next one's codes
    assert failed(tmp_path, vqvae=str(run / "vqvae"), codes=str(tmp_path / "codes")).keys() == {
        "extraction"
    }


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
    config = QuantizerConfig(**quantizer)
    size, dim = (
        (int(np.prod(config.fsq_levels)), len(config.fsq_levels))
        if config.kind == "fsq"
        else (512, 8)
    )
    finding = check_round_trip(make_quantizer(config, size, dim), "top")
    assert finding.passed
    assert f"all {size} codes" in finding.message


def test_codes_that_do_not_come_back_are_named() -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer(QuantizerConfig(), 32, 2)
    assert isinstance(quantizer, CodebookQuantizer)
    quantizer.codebook[20] = quantizer.codebook[3]
    found = check_round_trip(quantizer, "top")
    assert not found.passed
    assert "1 of 32 codes come back as others (20 as 3)" in found.message
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
    assert (
        "FAIL  parts: the priors are of the levels [0], but the autoencoder needs [0, 1]"
        in capsys.readouterr().out
    )
