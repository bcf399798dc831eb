"""Files that are whole even if a run is killed, one writer at a time, stamps that show a change, text in UTF-8."""

import glob
import json
import logging
import os
import re
import socket
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from custom_components.errors import InputError
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# of the files that hold the voxels of a header
VOXEL_SUFFIXES = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz", ".raw.bz2")}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, in a folder that is made if need be, for the block to write.

    Renamed to ``path`` when the block ends well, deleted when it raises. It ends like ``path``, by which some libraries
    choose the format, and holds the process's number, so that several may write at once on one machine; where several
    machines may write the same file, :func:`only_writer` lets them take turns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def not_worth_a_run(path: str | Path) -> Iterator[None]:
    """Where the block, which draws a picture, fails, be it by a full disk or a missing font, a warning says so and the
    run goes on: a picture only shows what is written elsewhere."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning(f"{path}: not drawn ({cause}); only the picture is missing")


@contextmanager
def picture(path: str | Path) -> Iterator[Path]:
    """:func:`replacing` for a picture, which is :func:`not_worth_a_run`."""
    with not_worth_a_run(path), replacing(path) as temporary:
        yield temporary


def check_folder(key: str, path: str | Path) -> None:
    """Make sure that files can be written in the folder that ``key`` names, which need not be there yet.

    Raises:
        InputError: it is, or lies below, a file, or it cannot be written.
    """
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise InputError(f"{key} {path}: {there} is no folder: give another, or move it away")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{key} {path} cannot be written ({error.strerror}): give a folder that can") from error


@contextmanager
def only_writer(lock: str | Path, what: str, key: str, wait: bool = False) -> Iterator[None]:
    """The block runs while no other process is in such a block of the same lock, on this machine or on another.

    The system holds the lock, and lets it go with the process, however that ends: a lock file that is left behind locks
    nothing. A process that holds it may take it again. On a network file system this is as true as its locks are.

    Args:
        lock: file, made here and deleted at the end, in a folder that is made if need be.
        what: is written, for the message.
        key: of the config, that would lead elsewhere.
        wait: for the other to end, with a line that says so.

    Raises:
        InputError: another process has it, and ``wait`` is false.
    """
    lock = Path(lock).absolute()
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, is_singleton=True, thread_local=False)
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            other = f"{what} is being written by {_holder(lock)}"
            if not wait:
                raise InputError(f"{other}: let it end, or stop it, or give another {key}") from None
            logger.warning(f"{other}: waiting for it to end")
            held.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise
        logger.warning(f"{lock.parent}: this disk has no locks ({error}): see to it that no second run writes there")
        yield
        return
    try:
        _sign(lock)
        yield
    finally:
        if held.is_locked:  # not in a process forked meanwhile
            if held.lock_counter == 1:
                lock.unlink(missing_ok=True)  # before it is let go: who gets it after that looks for the file again
            held.release()


class Claims:
    """Pieces of work that processes share, on one machine or several: what one has claimed, the others leave to it.

    The system holds each claim, and lets it go with the process, as in :func:`only_writer`. A disk without locks lets
    every claim through: work is then done twice, and nothing is lost.

    Args:
        folder: in which each claim is a hidden file while it is held, and after a kill until it is claimed again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.held: dict[str, FileLock] = {}
        self.told = False

    def take(self, name: str) -> bool:
        """Whether this process has the claim now, or had it before."""
        if name in self.held:
            return True
        lock = FileLock(self.folder / f".{name}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            if not self.told:
                logger.warning(f"{self.folder}: this disk has no locks ({error}): other processes may do the same work")
            self.told = True
            return True
        self.held[name] = lock
        _sign(Path(lock.lock_file))
        return True

    def holder(self, name: str) -> str:
        """Process and host of who holds a claim."""
        return _holder(self.folder / f".{name}.lock")

    def release(self, name: str) -> None:
        """Let others claim it, if this process has it."""
        if lock := self.held.pop(name, None):
            Path(lock.lock_file).unlink(missing_ok=True)  # before it is let go, as in only_writer
            lock.release()

    def left(self) -> list[str]:
        """Names of claims that are held, here or elsewhere, or that killed processes have left."""
        return [path.name[1:-5] for path in self.folder.glob(".*.lock")]


def _sign(lock: Path) -> None:
    with suppress(OSError):  # a full disk; who is told of it is not told whose it is
        lock.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))


def _holder(lock: Path) -> str:
    try:
        told = json.loads(lock.read_text())
        return f"process {told['process']} on {told['host']}"
    except (OSError, ValueError, KeyError):  # it has just begun, or just ended
        return "another process"


def remove_temporary(path: str | Path) -> None:
    """Delete what killed processes left of :func:`replacing` ``path``. Only while none writes there."""
    path = Path(path)
    for temporary in path.parent.glob(f".*.tmp.{glob.escape(path.name)}"):
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: str | Path, paths: Iterable[str]) -> None:
    """As :func:`remove_temporary` for many ``paths``, relative to ``folder``, in one walk through it."""
    own = {os.path.join(folder, path) for path in paths}
    for parent, _, names in os.walk(folder):
        for name in names:
            target = re.fullmatch(r"\.\d+\.tmp\.(.+)", name)
            if target and os.path.join(parent, target[1]) in own:
                Path(parent, name).unlink(missing_ok=True)


def file_stamp(path: str | Path) -> str:
    """Number, size and latest time of change of a scan's files: a folder's, or a header's with its voxels' beside it.

    Prepared data sets hold these stamps: another format of them would have all volumes prepared anew.

    Raises:
        OSError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        found = [entry.stat() for entry in os.scandir(path) if entry.is_file()]
    else:
        voxels = map(path.with_suffix, VOXEL_SUFFIXES.get(path.suffix.lower(), ()))
        found = [path.stat(), *(file.stat() for file in voxels if file.exists())]
    return f"{len(found)}:{sum(f.st_size for f in found)}:{max((f.st_mtime_ns for f in found), default=0)}"


def read_text(path: str | Path, what: str = "text") -> str:
    """All of a text file in UTF-8, without the mark that some editors begin it with.

    Raises:
        InputError: it cannot be read, or is no regular file: a pipe would be waited for, and a device never ends. It is
            not UTF-8; or holds zeros, as every second byte of plain words in UTF-16 is one.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"it is {'a folder' if path.is_dir() else 'a pipe or a device'}")
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes, as UTF-16 does")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(
            f"{path} cannot be read as {what} in UTF-8 ({error}): save it so, or download it again"
        ) from error
    return text


def no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """``object_pairs_hook`` of JSON, whose own readers would take the last in silence."""
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"it has the key {repeated[0]!r} twice in one place")
    return dict(pairs)
