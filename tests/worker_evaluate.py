"""`vqvae2 evaluate` with hasty classifiers. Run by test_evaluate.py."""

import sys

from pipelines.cli import main
from pipelines.evaluation import classifier

classifier.FEWEST_STEPS, classifier.CELLS = 10, 0
sys.exit(main(["evaluate", *sys.argv[1:]]))
