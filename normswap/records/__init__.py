"""Plain records of what was measured and decided, and their JSON form.

This package never measures, prints or draws anything.
"""
