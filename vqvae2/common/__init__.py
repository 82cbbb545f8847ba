"""The floor that every package stands on: configuration, files, artifacts, loading order, the one training loop, pictures.

Nothing here knows what a codebook or a prior is.
"""
