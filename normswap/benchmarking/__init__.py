"""Time the original, the fused model and the norm-free bound in turn, and report the ratio with its spread.

This package never compares times from different processes.
"""
