"""Hold an accuracy budget: rank the LayerNorms, put some back, convert again, and keep the best.

This package never decides without measuring a conversion on the evaluation images.
"""
