"""What belongs together: decided here, for pipelines, the doctor and every command."""

from collections.abc import Sequence
from typing import Any

from prior.base import Prior
from prior.manifest import Manifest
from vqvae2.common.errors import UserError
from vqvae2.common.vocabulary import describe_grids, describe_vectors
from vqvae2.model import VQVAE2

ADVICE = "Extract codes with this autoencoder and train every prior on them."
FACTS = ("encoder", "codes", "grids", "classes", "condition")


def mismatches(
    vqvae: VQVAE2 | None,
    priors: Sequence[Prior],
    manifest: Manifest | None = None,
    *,
    complete: bool = False,
    facts: Sequence[str] = FACTS,
) -> list[str]:
    """Why these do not belong together: clauses that name both sides; empty if they do. `facts` are
    compared; if `complete`, there must be one prior for every level."""
    # The levels.
    wrong, levels = [], [prior.config.level for prior in priors]
    needed = list(range(vqvae.config.num_levels)) if vqvae is not None and complete else levels
    if levels != needed:
        expected = f"the autoencoder needs {needed}, one per level, the top first: give them so"
        wrong.append(f"the priors are of the levels {levels}, but {expected}")
    elif len(set(levels)) < len(levels):
        wrong.append(f"the priors are of the levels {levels}, some of which come twice")

    # Every claim against the first about the same fact; of grids the levels that both have.
    for fact, claims in _claims(vqvae, priors, manifest).items():
        for value, clause in claims[1:] if fact in facts else ():
            first, first_clause = claims[0]
            if any(one != other for one, other in zip(value, first, strict=False)):
                wrong.append(f"{clause}, but {first_clause}")
    return wrong


def refuse_mismatches(*given: Any, **options: Any) -> None:
    """Raise a `UserError` with the `mismatches` of these arguments, if there are any."""
    if wrong := mismatches(*given, **options):
        advice = "" if "give them so" in wrong[0] else f" {ADVICE}"
        raise UserError(f"{'; '.join(wrong)}.{advice}")


def _claims(
    vqvae: VQVAE2 | None, priors: Sequence[Prior], manifest: Manifest | None
) -> dict[str, list[tuple[list[Any], str]]]:
    """What each says about itself, by fact: the value, and a clause."""
    claims: dict[str, list[tuple[list[Any], str]]] = {fact: [] for fact in FACTS}

    def add(name: str, grids: Any, sizes: Any) -> None:
        levels = describe_grids(grids, sizes)
        claims["grids"].append((levels, f"{name} has the grids {', '.join(levels)}"))

    # The autoencoder.
    if vqvae is not None:
        encoder = vqvae.content_hash()
        claims["encoder"].append(([encoder], f"the autoencoder is {encoder[:12]}"))
        add("the autoencoder", vqvae.config.grids, vqvae.config.codebook_size_per_level)

    # The code dataset and the priors, which hold the same facts.
    sources: list[Any] = [] if manifest is None else [manifest]
    for source in sources + [prior.config for prior in priors]:
        name, codes_verb, verb = "the code dataset", "is", "holds"
        if source is not manifest:
            name, verb = f"the prior of level {source.level}", "was trained on"
            codes_verb = f"{verb} the code dataset"
        encoder, codes = source.encoder_hash, source.codes_hash
        claims["encoder"].append(([encoder], f"{name} {verb} codes of the encoder {encoder[:12]}"))
        claims["codes"].append(([codes], f"{name} {codes_verb} {codes[:12]}"))
        add(name, source.grids, source.codebook_sizes)
        if source.class_names or source is manifest:  # a prior may do without the classes
            classes = ", ".join(source.class_names) or "none"
            claims["classes"].append(([classes], f"{name} has the classes {classes}"))
        vectors = describe_vectors(source.vector_size, source.vector_names)
        own = [source.vector_size, source.vector_names]
        claims["condition"].append((own, f"{name} is conditioned on {vectors}"))
    return claims
