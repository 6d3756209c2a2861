"""Write a model as one ONNX or torch.export graph, check it against the model, and look for LayerNorm in it.

This package never lets a file appear that failed its check.
"""
