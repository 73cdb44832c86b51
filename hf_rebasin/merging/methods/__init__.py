"""Merge methods: one file each, exporting a function `merge(tensors, *, knobs)` of one key's tensors.

The tensors arrive in at least float32 (float64 where the models are float32 or wider), in the order of the models; the
result is rounded once, to the dtype of the output. The keyword arguments are the knobs, their defaults the defaults.

`ELEMENTWISE = True` promises that every element of the result hangs on the same element of the tensors alone; such a
method is streamed chunk by chunk, and gets flat pieces of the tensors. One that has to know some numbers of the whole
tensors first is streamed, too, if these add up over pieces: a function `sums(tensors)` gives those of a piece, and
`merge(tensors, sums, *, knobs)` gets what they add up to.
"""
