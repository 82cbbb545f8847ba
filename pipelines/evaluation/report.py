"""The report of an evaluation: what the figures mean, in words; tables, pictures and plots."""

import html
import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pipelines.evaluation.figures import Figures
from pipelines.pictures import embedded
from vqvae2.codebook_stats import level_name
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json, write_text
from vqvae2.common.metrics import Points, draw_panel, quality
from vqvae2.common.pictures import sheet
from vqvae2.data.splits import few

Row = Mapping[str, Any]  # column -> a text, a number, value and error, or value and interval
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2rem auto;max-width:72rem;line-height:1.4}}
img{{max-width:100%}} table{{border-collapse:collapse}} div{{overflow-x:auto}}
td,th{{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}}
td:first-child,th:first-child{{text-align:left}} small{{color:#555}} li{{margin:.4rem 0}}</style>
<h1>{title}</h1>
{body}</html>
"""
MEANINGS = {
    "distance": "how far the images as a set are from the real ones, 0 at best; it falls with the "
    "number of images, so compare it only at equal counts",
    "distance of N": "the same of N of the images",
    "distance at infinity": "an estimate of what it would be for infinitely many images; after ± "
    "stands the error of the fit, not what other samples would change",
    "kernel distance": "another distance, that does not depend on the count, ± its standard error; "
    "around 0 at best",
    "precision": "the share of images that look like real ones: low means that many are wrong",
    "recall": "the share of real images that look like one of these: low means little variety",
    "density, coverage": "the same two questions, less moved by a few odd images",
    "score": "higher when each image is clearly of one class, and together of many, ± its standard "
    "error",
    "in brackets": "95 % intervals",
}
ENOUGH = 1000  # images: the distance of fewer is mostly chance, which real ones have as well
COMPARISON = "comparison.html"
USUAL = "usual settings"  # a temperature and top-p of 1
MAIN = ("distance", "kernel distance", "precision", "recall", "density", "coverage", "score")
TITLES = {
    "file": "Against the statistics of a file",
    "reconstructions": "Reconstructions beside their own originals",
    "levels": "Which level loses",
    "memorised": "Memorised?",
    "prior gaps": "Bits per code of the priors",
    "accuracy": "Classification accuracy score",
}
INTRODUCTIONS = {
    "file": "The reference set of which --statistics-file holds mean and covariance.",
    "reconstructions": "What is left of the very images{rfid}.",
    "levels": "Real codes down to a level, and sampled ones below it, beside real ones.",
    "memorised": "Share of samples that are as close to a training image as only the closest 5 % "
    "of held-out images are (closer), beside the share of held-out images that are (expected).",
    "prior gaps": "A prior that knows training images much better has memorised them.",
    "accuracy": "Accuracy on held-out images of a classifier that was trained on each.",
    "sweep": "Temperatures, or a top-p, at each guidance scale, with equally many samples.",
    "rejection": "Of more and more candidates, those that the classifier finds likeliest to be of "
    "their class (vqvae2 sample --reject), always equally many. The classifier judges itself here, "
    "so look at what happens to recall.",
}


def describe(extractor: Any) -> dict[str, Any]:
    """What must be equal where distances are compared."""
    names = ("name", "version", "weights_hash", "distance_name", "kernel_distance_name")
    return {name: getattr(extractor, name) for name in names}


# What it means


def summary(found: Figures) -> list[str]:
    """Sentences for a person who knows no metric: how good, where it is lost, what to do next."""
    lines = [
        *_of_stage_1(found),
        *_of_samples(found),
        *_of_accuracy(found),
        *_of_memory(found),
        *_of_settings(found),
    ]
    if found["decides"] != "held-out images":
        lines.append(
            "Fewer than 500 images are held out, so these distances are to training images, by "
            "which a model that has memorised them looks good: hold out more for a stricter "
            "judgement."
        )
    return lines


def reference(found: Figures) -> Mapping[str, Figures]:
    """The figures that matter: against held-out images, if there are many."""
    return found["against"][found["decides"]]


def _of_stage_1(found: Figures) -> list[str]:
    if "stage 1" not in found:
        return []
    mse = found["stage 1"]["Reconstruction"]["all levels"]["MSE"]
    wrong = [text for text in found["stage 1"]["verdicts"] if not text.endswith("in use.")]
    wrong = [v for v in wrong if "is needed" not in v and "too few to judge" not in v]
    images = found["stage 1"]["images"]
    return [f"The autoencoder's reconstructions of {images}: {quality(mse)}.", *wrong]


def _of_samples(found: Figures) -> list[str]:
    """How far samples are, who is to blame, and whether quality or variety is missing."""
    # The distances.
    rows, name = reference(found), found["extractor"]["distance_name"]
    distances = {key: figures["distance"] for key, figures in rows.items()}
    real, made = distances["real"], distances.get("reconstructions")
    if "samples" not in rows:
        said = f"{name} of reconstructions is {made:.3g}; as many other real images have {real:.3g}"
        return [f"{said}, which is the best that can be."]
    beside = f"as many other real images have {real:.3g}, the best that can be"
    if made is not None and found["given"]:
        beside += f"; the autoencoder's reconstructions of them have {made:.3g}"
    elif made is not None:
        beside = (
            f"reconstructions of real images have {made:.3g}, about the best that priors reach "
        )
        beside += f"with this autoencoder, and real images {real:.3g}"
    lines = [f"{name} of the samples is {distances['samples']:.3g} (0 is perfect); {beside}."]

    # Who loses most.
    gaps, worst = found.get("prior gaps", {}), _worst_level(found)
    if made is not None and not found["given"]:
        by_priors, by_autoencoder = distances["samples"] - made, max(made - real, 0.0)
        if distances["samples"] < 1.2 * real:
            number = rows["samples"]["count"]
            coarse = f", which is coarse for {number} images" if number < ENOUGH else ""
            lines.append(f"They can hardly be told from real images by this measure{coarse}.")
        elif by_priors > by_autoencoder:
            it, blame = "them", "The priors lose most"
            if worst:
                it, blame = "it", f"{blame}, the {worst} one of them"
            elif len(found.get("stage 1", {}).get("Codebooks", ())) == 1:
                it, blame = "it", "The prior loses most"
            help_ = f"train {it} longer, or make {it} larger"
            if any(_over_fitted(gap) for name, gap in gaps.items() if worst in ("", name)):
                help_ = "longer training may not help: training images are known better (see below)"
            lines.append(f"{blame}: {help_}.")
        else:
            lines.append(
                "The autoencoder loses most: train it longer, or give it more codes (larger "
                "model.codebook_sizes, or finer grids by smaller model.strides)."
            )

    # Quality or variety.
    ours = made is not None and not found["given"]
    best = rows["reconstructions" if ours else "real"]
    shares = {key: rows["samples"][key][0] for key in ("precision", "recall")}
    ratios = {key: shares[key] / max(best[key][0], 1e-9) for key in shares}
    kind = "reconstructions" if ours else "other real images"
    sentence = f"{shares['precision']:.0%} of the samples look like real images (of {kind} "
    sentence += f"{best['precision'][0]:.0%}), and {shares['recall']:.0%} of the real images look "
    sentence += f"like samples (like {kind} {best['recall'][0]:.0%})"
    advice = ""
    if ratios["precision"] > 0.9 and _is_sparse(rows):
        verdict = "yet few real images stand close to them (see density): too many are wrong."
    elif min(ratios.values()) > 0.9:
        reach = "as this autoencoder allows" if ours else "as can be"
        verdict = f"quality and variety are about as good {reach}."
    elif ratios["precision"] < ratios["recall"] - 0.1:
        verdict = "too many are wrong."
        guidance = ", or a --guidance-scale above 1," if found["guided"] else ""
        advice = f"A lower --temperature{guidance} may help"
    elif ratios["recall"] < ratios["precision"] - 0.1:
        verdict = "variety is missing."
        guidance = " and guidance scales" if found["guided"] else ""
        advice = f"Temperatures{guidance} near 1 have most of it"
    else:
        verdict = "quality and variety are missing alike."
    if advice and not found["given"]:
        verdict += f" {advice}; --sweep tries them."
    lines.append(f"{sentence}: {verdict}")

    # The worst class, and those of which nothing can be said.
    classes = {key: each["samples"]["coverage"] for key, each in found.get("classes", {}).items()}
    if len(classes) > 1:
        worst = min(classes, key=lambda key: classes[key])
        lines.append(
            f"The class with the least variety is {worst}: {classes[worst]:.0%} of its real images "
            f"have a sample near them (of the best class {max(classes.values()):.0%})."
        )
    if short := found.get("few"):
        lines.append(f"Too few samples to judge: {few(_counted(short))}.")
    return lines


def _is_sparse(rows: Mapping[str, Figures]) -> bool:
    """Whether real images stand far less closely around samples than around real images. If the
    precision is high all the same, samples look like a few odd ones alone."""
    return bool(rows["samples"]["density"][0] < 0.3 * rows["real"]["density"][0])


def _counted(numbers: Mapping[str, int]) -> list[str]:
    return [f"{name} ({number})" for name, number in numbers.items()]


def _worst_level(found: Figures) -> str:
    """The level whose prior adds most to the distance, if there are several."""
    distances = {key: row["distance"] for key, row in found.get("levels", {}).items()}
    if not distances:
        return ""
    losses = [before - after for before, after in pairwise(distances.values())]
    return level_name(max(range(len(losses)), key=lambda level: losses[level]), len(losses))


def _of_accuracy(found: Figures) -> list[str]:
    scores = {name: row["top 1"] for name, row in found.get("accuracy", {}).items()}
    if not scores:
        return []
    names = {"real": "real images", "reconstructions": "reconstructions"}
    others = [f"{scores[key]:.0%} from {name}" for key, name in names.items() if key in scores]
    return [
        f"A classifier that has learned from samples alone recognizes {scores['samples']:.0%} of "
        f"held-out images; one that learned from as many others: {', '.join(others)}."
    ]


def _of_memory(found: Figures) -> list[str]:
    # Samples that are as close to training images as few others are.
    lines = []
    spaces = found.get("memorised", {})
    judged = {name: each for name, each in spaces.items() if "memorised" in each}
    guilty = [name for name, each in judged.items() if each["memorised"]]
    if guilty and _is_sparse(reference(found)):
        lines.append(
            "Whether images were memorised cannot be said: samples do not look like real images "
            "yet, and blurred ones are close to many."
        )
    elif guilty:
        worst = judged[max(guilty, key=lambda name: judged[name]["closer"])]
        lines.append(
            f"Memorised: {worst['closer']:.0%} of the samples are as close to a training "
            f"image as only {worst['expected']:.0%} of held-out images are (by "
            f"{', '.join(guilty)}): look at the closest pairs below; more images, more dropout or "
            "fewer steps help."
        )
    elif judged:
        worst = max(judged.values(), key=lambda each: each["closer"])
        lines.append(
            f"No sign of memorisation: {worst['closer']:.0%} of the samples are as close to a "
            f"training image as {worst['expected']:.0%} of held-out images are"
            f"{', by chance, as there are few' if worst['closer'] > 2 * worst['expected'] else ''}."
        )
    elif spaces:
        lines.append("Whether images were memorised cannot be said: hold out 20 or more.")

    # Priors that know training images better than others.
    for name, each in found.get("prior gaps", {}).items():
        if _over_fitted(each):
            lines.append(
                f"The prior of the {name} codes needs {each['training']:.2f} bits for a code of a "
                f"training image, and {each['held out']:.2f} for others: it over-fits; more "
                "images, random changes of them, or more dropout would help."
            )
    return lines


def _over_fitted(gap: Mapping[str, float]) -> bool:
    return bool(gap) and gap["gap"] > 0.1 * gap["training"]


def _of_settings(found: Figures) -> list[str]:
    rows = found.get("sweep", [])
    if not rows:
        return []
    best = min(rows, key=lambda row: row["distance"])
    usual = next(row for row in rows if _flags(row) == "")
    if best is usual:
        return [f"Of {len(rows)} settings, the usual ones are the best."]
    return [
        f"Of {len(rows)} settings the best have {best['distance']:.3g}, the usual ones "
        f"{usual['distance']:.3g} (of {best['count']} samples): sample with {_flags(best)}."
    ]


def _flags(row: Row) -> str:
    """A row's settings as flags of `vqvae2 sample`, if they are not 1."""
    words = []
    for key in ("temperature", "top_p", "guidance_scale"):
        values = str(row[key]).split()  # a temperature per level
        if any(float(value) != 1 for value in values):
            words += [f"--{key.replace('_', '-')}", *values]
    return shlex.join(words)


# The page


def write(folder: Path, found: Figures, pictures: Mapping[str, Image]) -> str:
    """Write figures.json and index.html; returns the summary and the main table as text."""
    lines = summary(found)
    write_json(folder / "figures.json", {"summary": lines, **found})
    extractor = found["extractor"]
    seen = f"{extractor['name']} {extractor['version']}, weights {extractor['weights_hash'][:12]}"
    body = ["<ul>", *(f"<li>{html.escape(line)}" for line in lines), "</ul>"]

    # Samples beside what they are to be like.
    for title, rows in found["against"].items():
        body += [f"<h2>Against {title}</h2>", html_table(named(rows, extractor))]
    meanings = "; ".join(
        f"<b>{html.escape(_own_name(name, extractor))}</b>: {text}"
        for name, text in MEANINGS.items()
    )
    body.append(f"<p><small>Seen by {html.escape(seen)}. {meanings}.</small></p>")
    captions = {"samples": "Samples", "reconstructions": "Reconstructions"}
    for name, picture in pictures.items():
        caption = captions.get(name, f"The samples {name} to a training image")
        body.append(embedded(caption.replace("closest in", "closest by"), picture))

    # The other tables.
    rfid = ": what papers call rFID" if extractor["distance_name"] == "FID" else ""
    for key, title in TITLES.items():
        if found.get(key):
            text = INTRODUCTIONS[key].format(rfid=rfid)
            body += [f"<h2>{title}</h2><p>{text}</p>", html_table(named(found[key], extractor))]
    for title, rows in found.get("stage 1", {}).items():
        if isinstance(rows, dict):
            body += [f"<h2>{html.escape(title)}</h2>", html_table(rows)]
    for key, title in (("sweep", "Settings"), ("rejection", "Rejection by the classifier")):
        if rows := found.get(key):
            numbered = {str(number): row for number, row in enumerate(rows, 1)}
            body += [f"<h2>{title}</h2><p>{INTRODUCTIONS[key]}</p>"]
            body.append(html_table(named(numbered, extractor)))
            picture = _plot(rows, extractor["distance_name"])
            body.append(embedded("Quality and diversity", picture))
    if classes := found.get("classes"):
        flat = {f"{c}: {name}": row for c, each in classes.items() for name, row in each.items()}
        body += ["<h2>By class, against training images</h2>", html_table(named(flat, extractor))]
    if short := found.get("few"):
        body.append(f"<p>Too few samples to judge: {html.escape(', '.join(_counted(short)))}.</p>")
    title = html.escape(f"Evaluation: {found['data']}")
    write_text(folder / "index.html", PAGE.format(title=title, body="\n".join(body)))
    table = _main(reference(found), extractor)
    return "\n".join([*lines, "", table, "", f"{folder / 'index.html'} shows all of it."])


def named(rows: Mapping[str, Row], extractor: Row) -> dict[str, Row]:
    """The same with the distances under their own names."""
    result: dict[str, Row] = {}
    for key, row in rows.items():
        result[key] = {_own_name(column, extractor): value for column, value in row.items()}
    return result


def _own_name(column: str, extractor: Row) -> str:
    """What a column is called: a distance FID, or FD (extractor), of N, at infinity, ..."""
    if column.startswith("distance"):
        return extractor["distance_name"] + column.removeprefix("distance")
    return extractor["kernel_distance_name"] if column == "kernel distance" else column


def _main(rows: Mapping[str, Row], extractor: Row, *more: str) -> str:
    """The columns that matter, as text."""
    short: dict[str, Row] = {}
    for key, row in rows.items():
        short[key] = {c: row[c] for c in ("of", "count", *more, *MAIN) if c in row}
    return as_text(named(short, extractor))


def _text(value: Any) -> str:
    """A cell: a number, value and error, or value and interval."""
    if isinstance(value, list) and len(value) == 3:
        return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"
    if isinstance(value, list):
        return f"{value[0]:.4g} ± {value[1]:.2g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Mapping[str, Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def html_table(rows: Mapping[str, Row]) -> str:
    """A table for a page."""
    columns = _columns(rows)
    lines = ["<div><table><tr><th>", *(f"<th>{html.escape(name)}" for name in columns)]
    for name, row in rows.items():
        cells = "".join(f"<td>{html.escape(_text(row.get(c, '')))}" for c in columns)
        lines.append(f"<tr><td>{html.escape(name)}{cells}")
    return "\n".join([*lines, "</table></div>"])


def as_text(rows: Mapping[str, Row]) -> str:
    """A table for a terminal."""
    columns = _columns(rows)
    table = [["", *columns]]
    for name, row in rows.items():
        table.append([name, *(_text(row.get(c, "")) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        texts = [f"{cells[0]:{widths[0]}}"]
        texts += [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)


def _plot(rows: Sequence[Row], distance_name: str) -> Image:
    """Precision against recall, and the distance against recall: a row of both for each kind of
    setting, whose curves end at a temperature and top-p of 1."""
    panels: list[list[Image]] = []
    kinds = [kind for kind in dict.fromkeys(map(_kind, rows)) if kind != USUAL]
    for kind in kinds or [USUAL]:
        panels.append([])
        ordered = [row for row in rows if _kind(row) == kind]
        ordered += [row for row in rows if _kind(row) == USUAL] if kind != USUAL else []
        for column in ("precision", "distance"):
            curves: dict[str, Points] = {}
            for row in ordered:
                name = f"guidance {row['guidance_scale']}" if kind else "kept"
                curves[name] = [*curves.get(name, ()), (row["recall"], row[column])]
            title = distance_name if column == "distance" else column
            title += f", {kind}" if kind else ""
            panels[-1].append(draw_panel(title, curves, x_name="recall"))
    return sheet(panels)


def _kind(row: Row) -> str:
    """Which setting a row of a sweep varies, or `USUAL` for none; nothing for other rows."""
    if "temperature" not in row:
        return ""
    temperatures = row["temperature"].split()
    if row["top_p"] != 1:
        return f"top-p {row['top_p']}"
    if len(temperatures) > 1:
        return "the finest level's temperature"
    return USUAL if float(temperatures[0]) == 1 else "temperature"


# Several evaluations


def compare(folders: Sequence[Path], output_dir: str) -> str:
    """Evaluations side by side, as text, and as a page if a folder is given.

    Raises:
        UserError: fewer than two, no evaluation, or evaluations by other extractors or of other
            images.
    """
    # The figures of each.
    if len({folder.resolve() for folder in folders}) < 2:
        raise UserError("there is nothing to compare: give two or more evaluations.")
    found: dict[str, Figures] = {}
    alike = len({folder.name for folder in folders}) < len(folders)  # as runs/x/evaluation are
    for folder in folders:
        path = folder / "report" / "figures.json"
        each = found[str(folder) if alike else folder.name] = read_json(path)
        if not {"against", "decides", "extractor"} <= each.keys():  # but inspect's
            raise UserError(f"{path} is no evaluation: give folders that vqvae2 evaluate wrote.")
    refuse_other_eyes(found)
    one = next(iter(found.values()))

    # What each says.
    rows: dict[str, Row] = {}
    for name, each in found.items():
        against = reference(each)
        kind = "samples" if "samples" in against else "reconstructions"
        rows[name] = {"of": kind, **against[kind]}
    limit, column = "distance at infinity", "distance"
    if len({row["count"] for row in rows.values()}) > 1:
        column = limit
    best = min(rows, key=lambda name: _first(rows[name][column]))
    lines = [f"{best} has the lowest {_own_name(column, one['extractor'])}."]
    if close := [name for name in rows if name != best and _may_be_alike(rows[name], rows[best])]:
        lines.append(f"Its lead over {', '.join(close)} may be chance.")
    if column == limit:
        lines.append("The counts differ, so the distances at infinity are compared.")
    if len({row["of"] for row in rows.values()}) > 1:
        lines.append(
            "Samples stand beside reconstructions here, of which better ones are expected."
        )
    if output_dir:
        body = ["<p>", *map(html.escape, lines), "</p>", html_table(named(rows, one["extractor"]))]
        for name, each in found.items():
            texts = "".join(f"<li>{html.escape(line)}" for line in each["summary"])
            body.append(f"<h2>{html.escape(name)}</h2><ul>{texts}</ul>")
        page = PAGE.format(title="Evaluations", body="\n".join(body))
        write_text(Path(output_dir) / COMPARISON, page)
    return "\n".join([*lines, "", _main(rows, one["extractor"], column)])


def _may_be_alike(one: Row, other: Row) -> bool:
    """Whether two distances at infinity may be equal (with 95 %), where both have an error."""
    given = one.get("distance at infinity"), other.get("distance at infinity")
    if not all(isinstance(value, list) for value in given):
        return False
    (value, error), (other_value, other_error) = given  # type: ignore[misc]
    return bool(abs(value - other_value) < 1.96 * math.hypot(error, other_error))


def refuse_other_eyes(found: Mapping[str, Figures]) -> None:
    """Raise a `UserError` for figures, by name, that were not measured in the same way."""
    (first, one), *others = found.items()
    kinds = {
        "extractor": "seen by another network",
        "image_names_hash": "made beside other images",
        "image": "made beside images that were prepared in another way",
    }
    for name, other in others:
        for key, what in kinds.items():
            if one.get(key) != other.get(key):
                advice = "evaluate both with the same images and --features"
                raise UserError(
                    f"the figures of {name} were {what} than those of {first}: {advice}."
                )


def _first(value: Any) -> float:
    return value[0] if isinstance(value, list) else value
