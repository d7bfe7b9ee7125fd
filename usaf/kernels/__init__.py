"""The inner loops: each operation has a plain torch reference, and faster versions beside it where they pay.

The caller names an operation; which version runs follows from the tensors' device and dtype alone, never from a
measurement made here, so the same inputs give the same bits in every process.
"""
