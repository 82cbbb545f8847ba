"""`vqvae2 evaluate` with hasty classifiers, and a cache that the second process does not share, as
on another machine. Run by test_evaluate.py."""

import os
import sys

from pipelines.cli import main
from pipelines.evaluation import classifier

if os.environ.get("RANK") == "1":
    os.environ["XDG_CACHE_HOME"] += "_of_rank_1"
classifier.FEWEST_STEPS, classifier.CELLS = 10, 0
sys.exit(main(["evaluate", *sys.argv[1:]]))
