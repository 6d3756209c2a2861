"""Measure models side by side on the same images: top-1, agreement, KL, and the images that changed most.

This package never changes a model.
"""
