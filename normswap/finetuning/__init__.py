"""Distil the original into the swapped model, with the BatchNorms still in.

This package never keeps a result that is worse than its start on the images held out.
"""
