"""Locks that a forked process finds free.

A fork copies the memory of a process, and of its threads the one alone that forks: a lock that another one held is
copied held, and nobody is left to release it (pthread_atfork(3), "Rationale").
"""

import contextlib
import os
import threading
import weakref

_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class Lock:
    """A lock for `with`.  reentrant: the thread that holds it may take it once more."""

    def __init__(self, *, reentrant: bool = False) -> None:
        self._new = threading.RLock if reentrant else threading.Lock
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        """Makes it free, whoever held it."""
        self._held = self._new()

    def acquire(self, timeout_seconds: float = -1) -> None:
        """Takes it, or gives up after this time; negative: never."""
        self._held.acquire(timeout=timeout_seconds)

    def release(self) -> None:
        """Nothing where it is not held: after giving up, or by a thread that forked meanwhile, in the new process."""
        with contextlib.suppress(RuntimeError):
            self._held.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _renew_all() -> None:
    for lock in tuple(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
