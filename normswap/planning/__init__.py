"""Find each LayerNorm and feed-forward network in the exported graph, and decide what becomes of it.

This package never changes a model; `surgery` does, by the plan.
"""
