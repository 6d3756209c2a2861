"""Set every BatchNorm, and re-solve the layers around it, from unlabelled images and the original model.

This package never uses labels and never trains end to end.
"""
