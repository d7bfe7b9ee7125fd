"""The inner loops: each operation has a plain torch reference, and a faster version on the CPU, compiled by numba.

The caller names an operation; which version runs follows from the tensors' device, dtype and shape alone, never from a
measurement made here, so the same inputs give the same bits in every process.

Compiled functions run on the thread that calls them and release the GIL: `usaf.workers` calls them from several.
"""
