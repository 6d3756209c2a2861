"""Turn records into tables, a model card, SVG charts and report.html.

This package never measures anything and never writes a file.
"""
