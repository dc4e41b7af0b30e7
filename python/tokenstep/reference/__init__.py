"""Slow, obviously right versions of each op, in NumPy: what every kernel is tested against.

They follow the written contracts and share no code with the kernels. One module an op; nothing here is fast.
"""

from tokenstep.reference import numerics, sampling

__all__ = ["numerics", "sampling"]
