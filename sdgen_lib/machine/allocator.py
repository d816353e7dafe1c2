"""What the C library does with memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's names for its parameters, from glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep up to 1 GiB that it has freed, where the C library is glibc; elsewhere nothing.

    glibc gives it back, and every batch would have the kernel clear the same pages anew: in chapter 03's process 8.7
    million page faults and 16 s of system time, against 0.4 million and 2 s.
    """
    # Windows has no such library to ask, musl no such function, and some programs' own file cannot be read.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        if platform.libc_ver()[0] == "glibc":
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_TRIM_THRESHOLD, 2**30)  # bytes free at the heap's end before it is made shorter
            mallopt(M_MMAP_THRESHOLD, 2**25)  # larger blocks come and go one by one; glibc itself works up to this
