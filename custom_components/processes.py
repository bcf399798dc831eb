"""How processes end: a run that is asked to stop stops in order, and its workers never outlive it."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import NoReturn

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Interrupted(KeyboardInterrupt):
    """A signal has asked the run to end; its text says which, and what is kept.

    :class:`custom_components.run.start.OneLineErrors` prints that line alone, and the process ends with ``TRY_AGAIN``.
    """


class EndOnSignal:
    """Handler of SIGTERM, SIGINT and SIGUSR1: the first raises :class:`Interrupted`, the second ends at once.

    Attributes:
        received: the first signal's number, or None.
        deferred: set it to have ``received`` noted and nothing raised, where work may not be left in its midst.
        ending: set it where a last checkpoint is written: under torchrun, which passes signals on and ends all when one
            has ended, nothing then interrupts that.
    """

    SECONDS_OF_ONE_REQUEST = 5.0  # a batch system signals all processes, and torchrun passes on what it gets itself

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.received: int | None = None
        self.deferred = False
        self.ending = False
        self.since = 0.0

    @classmethod
    def install(cls) -> None:
        """Handle the signals from here on. Only the main thread can; in any other nothing changes."""
        if threading.current_thread() is threading.main_thread() and cls.current() is None:
            handler = cls()
            for number in SIGNALS:
                signal.signal(number, handler)

    @classmethod
    def current(cls) -> "EndOnSignal | None":
        """The handler of this process, if it has one."""
        handler = signal.getsignal(signal.SIGTERM)
        return handler if isinstance(handler, cls) and handler.pid == os.getpid() else None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return  # a worker that has just been forked: what it is to do is its parent's business
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if not self.deferred:
                self.end("ended; what is written stays until the same command writes anew, or goes on with it")
        elif not self._echo():
            signal.signal(number, signal.SIG_DFL)
            os.kill(self.pid, number)

    def _echo(self) -> bool:
        """Whether a signal only says again what the first has said."""
        soon = time.monotonic() - self.since < self.SECONDS_OF_ONE_REQUEST
        return "TORCHELASTIC_RUN_ID" in os.environ and (self.ending or soon)

    def end(self, told: str) -> NoReturn:
        """Raise :class:`Interrupted`. Engines that it passes log nothing: the run is told in one line.

        Args:
            told: what is kept, for the person who reads it.
        """
        self.ending = True
        logging.disable()
        # another process of the run may have got the signal
        name = "stopped" if self.received is None else signal.Signals(self.received).name
        raise Interrupted(f"{name}: {told}")


@contextmanager
def signals_wait() -> Iterator[None]:
    """No signal of :data:`SIGNALS` comes through in the block, nor in processes that it starts: what they begin with
    would else be open to one. Here they come after it, there :func:`follow_parent` takes them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(worker: int = 0) -> None:
    """What every worker process begins with: it ends with its parent, whatever ends that, and at its word alone.

    A signal to the whole group of processes (Ctrl-C, a batch system) would else take the worker's batch from a parent
    that still needs it, and a parent that is killed could not end a worker that hangs.

    Args:
        worker: its number, which data loaders pass and nothing here needs.
    """
    parent = multiprocessing.parent_process()
    told = {*SIGNALS} if hasattr(signal, "sigtimedwait") else set()
    signal.pthread_sigmask(signal.SIG_BLOCK, told)

    def watch() -> None:
        while not wait([parent.sentinel], 0 if told else None):
            info = signal.sigtimedwait(told, 0.5)
            if info is not None and info.si_signo == signal.SIGTERM and info.si_pid == parent.pid:
                break
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
