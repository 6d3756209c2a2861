"""Write a model as a folder, all or nothing, read it back, and send it to the Hugging Face Hub.

This package never changes the weights that it writes.
"""
