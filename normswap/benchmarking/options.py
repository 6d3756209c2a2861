"""What is timed by what, and how often. Imports no torch, so that the command line can read it."""

EAGER, COMPILE, ONNXRUNTIME = ENGINES = ("eager", "compile", "onnxruntime")
WALL, CPU = CLOCKS = ("wall", "cpu")
DEFAULT_ROUNDS, FEWEST_ROUNDS = 25, 3  # fewer have no spread
