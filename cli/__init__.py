"""normswap's command line; a thin layer: parse, call normswap, print. Installed as the package normswap_cli."""

if __name__ == "cli":
    raise ImportError("import normswap_cli: cli/ is installed under that name")
