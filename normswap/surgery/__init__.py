"""Edit the model by the plan: put BatchNorm in the place of LayerNorm, and fold it into its neighbours.

This package never looks at images and never sets a statistic.
"""
