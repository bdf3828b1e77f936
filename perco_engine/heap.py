"""Memory that was freed, back to the system."""

import ctypes
import sys


def release() -> bool:
    """Gives what this process has freed back to the system; returns whether there is a way (glibc's).

    glibc keeps blocks of up to 32 MB for itself, in a heap for each thread.  Networks that run on pictures of ever
    other sizes leave gaps that nothing fits, so without this the heaps grow for as long as new sizes come.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:  # another C library
        return False
    trim(0)
    return True
