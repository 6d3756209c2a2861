"""The embedded model and images: a tiny ViT trained on scikit-learn's digits, made by examples/make_demo.py.

config.json and model.safetensors are in timm's ``local-dir:`` form, train.tar and validation.tar are read by timm.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL = f"local-dir:{FOLDER}"
