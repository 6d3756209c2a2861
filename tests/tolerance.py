"""Every numeric tolerance of the test suite, with its reason, stated once."""

# A fold reorders a few hundred float64 products; 1e-9 absolute on logits of order 1 leaves room for 50 layers.
FOLD_FLOAT64 = 1e-9
# The same in float32 on weights of order 1: rounding 6e-8 per operation, through a dozen blocks.
FOLD_FLOAT32 = 1e-3
# One linear layer in float64, relative: sums of at most a thousand products.
LINEAR_FLOAT64 = 1e-10
# Float64 moments against numpy's two-pass result, relative to the spread; the offset costs digits of the data itself.
MOMENTS = 1e-9
# The same statistic from differently split batches: only the order of float64 additions changes.
SPLIT = 1e-9
# The same of float32 data, whose differences from the mean and their products are float32.
SPLIT_FLOAT32 = 1e-6
# What several processes calibrate against what one does: sums in another order, 1e-15, become 1e-13
# by solves and 1e-10 by a few dozen gradient steps.
PROCESSES = 1e-8
# Logits of a model calibrated on a GPU against the same on a CPU, relative: float32 sums in another order,
# through solves of condition 1e4 and a few dozen gradient steps.
GPU = 1e-2
