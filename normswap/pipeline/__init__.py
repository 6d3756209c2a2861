"""The whole road in one call: plan, swap, calibrate, fine-tune, fold, check, report.

This package never holds an algorithm of its own; each step belongs to another package.
"""
