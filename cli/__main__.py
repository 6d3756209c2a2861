"""``python -m normswap_cli``."""

from .main import cli

cli(prog_name="normswap")
