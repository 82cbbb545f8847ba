"""The floor that every package stands on: configuration, files, models, the one training loop.

Nothing here knows what a codebook or a prior is.
"""
