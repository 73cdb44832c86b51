"""Merge methods, one file each; `MergeMethod` in registry.py describes what a file may contain.

A file has at least a function `merge(tensors, *, …)` that merges the tensors of one key. They arrive in at least
float32 (float64 if the models are float32 or wider), in the order of the models; the result is rounded once, to the
dtype of the output. A method never sees a parameter that varies by tensor: it is called with the tensor's numbers.
"""
