"""Names that both stages and their files share. Torch-free."""

SPLITS = ("train", "validation")
"""The folders of prepared images and of a code dataset: rows to train on, and rows held out."""
ORIGINAL = "original"
"""The view of an image that is the image unchanged."""
TRAINING_RECORD = "train_config.yaml"
"""The file in a training's folder that says what was trained, on what, and how."""
