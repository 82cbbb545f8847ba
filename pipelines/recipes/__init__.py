"""The recipes that come with the package; the demo's is also used from here."""

from importlib.resources import files
from typing import Any

from pipelines.cli import load_recipe

DEMO_IMAGES = files("pipelines") / "demo_data" / "fashion_mnist.parquet"


def demo_recipe(budget: float, num_threads: int = 0) -> dict[str, Any]:
    """The demo recipe with this share of its training steps, and with these threads."""
    recipe = load_recipe("demo")
    for name in ("train", "extract", "prior_0", "prior_1", "sample"):
        section = recipe.setdefault(name, {})
        section["num_threads"] = num_threads
        if "num_steps" in section:
            section["num_steps"] = max(1, round(section["num_steps"] * budget))
    return recipe
