"""Models and images in: timm checkpoints, folders, tars and streams, brought to batches of one size.

This package never changes a model or an image set on disk.
"""
