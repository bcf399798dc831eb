"""How every run begins: errors and signals in one line, the bundle's own components, processes, memory, seed."""

import atexit
import errno
import gc
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import custom_components
import torch
from custom_components import distributed
from custom_components.cpu import keep_freed, threads_within_quota, wait_asleep_when_busy
from custom_components.distributed import world_size
from custom_components.errors import InputError
from custom_components.files import check_folder, only_writer
from custom_components.processes import SIGNALS, TRY_AGAIN, EndOnSignal, Interrupted
from custom_components.run.keys import check_keys, configs_folder, running
from custom_components.run.weights import trained_with
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS
from monai.utils import set_determinism
from tqdm import tqdm

logger = logging.getLogger(__name__)

HELD = ExitStack()  # locks, until this process ends
atexit.register(HELD.close)
STAMP = "stamp.json"  # what custom_components.run.export leaves beside the modules


def start(
    bundle_root: str | Path,
    seed: int | None = None,
    timeout_minutes: float | None = None,
    rank_zero_alone: bool = False,
    keys: str = "train",
    writes: Sequence[str] = (),
    evaluated: str | Path | None = None,
) -> None:
    """What ``initialize`` of every config does, once the bundle is on ``sys.path``.

    Errors that a person can mend, and signals, end in one line from here on (:class:`OneLineErrors`,
    :class:`custom_components.processes.EndOnSignal`), the components are the bundle's own (:func:`check_components`),
    all keys are known and in their range (:func:`check_keys`), no other run writes to ``models_dir`` until this process
    ends, MONAI's ``--tracking`` works (:func:`track_batches`), what is imported is not searched for garbage
    (:func:`keep_imported`), there are no more threads than a container's share of the CPUs, and where there is no GPU,
    freed memory stays with the process, and threads wait asleep where others want the cores
    (:mod:`custom_components.cpu`).

    Args:
        seed: of all random numbers, with deterministic algorithms; None for a run that draws none.
        timeout_minutes: under torchrun, how long a process waits for the others; None where one process works alone.
        rank_zero_alone: under torchrun, end all processes but one: the work is not divided.
        keys: the section of ``configs/keys.json`` that says what the config's keys may be.
        writes: the keys whose folders the run writes to.
        evaluated: of an evaluation, the training's checkpoint, from which keys that nobody gives take their values.

    Raises:
        InputError: the components are not this bundle's, a key is wrong, a folder cannot be written, another run writes
            to ``models_dir``, the checkpoint cannot be read, or the config needs torchrun and was started without.
    """
    OneLineErrors()
    EndOnSignal.install()
    check_components(bundle_root)
    values = check_keys(bundle_root, keys, None if evaluated is None else trained_with(evaluated))
    one_console()
    tell(bundle_root, keys, values, writes)
    track_batches()
    for key in writes:
        if values.get(key) is not None:
            check_folder(key, values[key])
    if rank_zero_alone:
        distributed.leave_to_rank_zero()
    if "models_dir" in writes and values.get("models_dir") is not None and int(os.environ.get("RANK", 0)) == 0:
        folder = Path(values["models_dir"])
        HELD.enter_context(only_writer(folder / ".lock", f"models_dir {folder}", "models_dir"))
    if timeout_minutes is not None:
        distributed.start(distributed.local_device(), timeout_minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed(device)
    threads_within_quota()
    wait_asleep_when_busy(device)
    keep_imported()
    if seed is not None:
        set_determinism(seed)


@contextmanager
def quietly() -> Iterator[None]:
    """Without MONAI's warnings that a config, here the bundle's own, may run code, and that no logging is set up."""
    loggers = [logging.getLogger(f"monai.bundle.{module}") for module in ("scripts", "workflows")]
    levels = [each.level for each in loggers]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="parsing config_file")
            for each in loggers:
                each.setLevel(logging.ERROR)
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


class AboveBars(logging.StreamHandler):
    """A console handler whose lines go above the progress bars, and not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)


def one_console() -> None:
    """Let the root logger's console handlers be :class:`AboveBars`."""
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler:
            above = AboveBars(handler.stream)
            above.setLevel(handler.level)
            above.setFormatter(handler.formatter)
            logging.root.removeHandler(handler)
            logging.root.addHandler(above)


def tell(bundle_root: str | Path, section: str, values: Mapping[str, Any], writes: Sequence[str]) -> None:
    """Log the first line of a run: which bundle and config, what it reads, and where its results go."""
    if not values or int(os.environ.get("RANK", 0)) > 0:
        return
    metadata = ConfigParser.load_config_file(configs_folder(bundle_root) / "metadata.json")
    data, run = values.get("dataset_dir"), running()
    if data is None and run is not None and isinstance(made := run.parser.get("dataset_dir"), Mapping):
        # it is yet to be made, by a component that is told where
        data = run.parser.get_parsed_content("dataset_dir#dataset_dir") if "dataset_dir" in made else made["_target_"]
    folders = dict.fromkeys(str(values[key]) for key in writes if values.get(key) is not None)
    reads = f"reads {data}, " if data is not None else ""
    logger.info(f"{metadata['name']} {metadata['version']}, {section}: {reads}writes {', '.join(folders)}")


def track_batches() -> None:
    """Let ``--tracking`` take a trainer's loss from whole batches: MONAI's default needs decollated ones."""
    run = running()
    handlers = run.parser.get("train#handlers") if run is not None else None
    handlers = [handler for handler in handlers if isinstance(handler, dict)] if isinstance(handlers, list) else []
    defaults = [settings["configs"]["trainer"]["output_transform"] for settings in DEFAULT_EXP_MGMT_SETTINGS.values()]
    tracking = [handler for handler in handlers if handler.get("output_transform") in defaults]
    for handler in tracking:
        handler["output_transform"] = "$lambda output: output['loss']"
    if tracking:
        run.parser.parse(reset=True)


def keep_imported() -> bool:
    """Take what is imported out of Python's search for garbage, where ``python -m monai.bundle`` runs.

    MONAI's imports make about a million objects, which live as long as the process: to search them at its end alone
    takes seconds. Elsewhere nothing is changed, since what lives there already may have to be freed.

    Returns:
        Whether anything was changed.
    """
    command = getattr(sys.modules["__main__"].__spec__, "name", "")
    if command != "monai.bundle.__main__" or gc.get_freeze_count():  # a comparison starts run after run
        return False
    gc.freeze()
    return True


def check_components(bundle_root: str | Path) -> None:
    """Make sure that a bundle runs on its own components, or on equal ones that another bundle brought before it.

    Every exported bundle brings ``custom_components``, with the modules that it needs and no others, and Python imports
    the first one only. What is not loaded yet is found in this bundle from here on. A bundle without components, as in
    the repository, takes what is installed.

    Raises:
        InputError: a module of the bundle differs from the one of that name in the components already loaded.
    """
    own = Path(bundle_root, "custom_components").resolve()
    folders = [Path(folder).resolve() for folder in custom_components.__path__]
    if own in folders or not own.is_dir():
        return
    modules = sorted(module.relative_to(own) for module in own.rglob("*.py"))
    for module, folder in itertools.product(modules, folders):
        if (folder / module).is_file() and (folder / module).read_bytes() != (own / module).read_bytes():
            raise InputError(
                f"{own} ({version(own)}): its {module} is not that of {folder} ({version(folder)}), on which this "
                "process runs already: run the bundles in processes of their own, or export both anew from one version"
            )
    custom_components.__path__.append(str(own))
    for package in {module.parent.name for module in modules} - {""}:
        importlib.import_module(f"{custom_components.__name__}.{package}").__path__.append(str(own / package))


def version(folder: Path) -> str:
    """Bundle, version and hash of an export's components, or that they are none."""
    if not (folder / STAMP).is_file():
        return "no export"
    stamp = json.loads((folder / STAMP).read_text())
    return f"{stamp['bundle']} {stamp['version']}, {stamp['sha256'][:12]}"


class OneLineErrors:
    """A ``sys.excepthook`` that prints an :class:`InputError` as one line, and so a full disk, a data loader's worker
    that is no more, and a signal; else all there is.

    The exit code is 1, and after a signal ``TRY_AGAIN``. Under torchrun, a process that fails ends at once, so that the
    others do not wait for it. Ranks above 0 wait a moment before they print, so that rank 0 alone reports what goes
    wrong in all of them.
    """

    PATTERN = re.compile(rf"^(?:.*\.)?{InputError.__name__}: (.+)$", re.MULTILINE)
    DISK = re.compile(rf"^OSError: (\[Errno (?:{errno.ENOSPC}|{errno.EDQUOT})\].*)$", re.MULTILINE)
    DEATH = re.compile(r"^RuntimeError: DataLoader worker \(pid\D+(\d+).*?\) (.+?)(?:\. |\.?$)", re.MULTILINE)
    SECONDS_BEHIND_RANK_ZERO = 5.0  # torchrun ends the others within one

    def __init__(self) -> None:
        sys.excepthook = self

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        code, number = 1, int(os.environ.get("RANK", 0))
        message = self.interruption(error)
        if message is not None:
            code = TRY_AGAIN
        else:
            hanging = distributed.hanging(error)
            if number > 0:
                for each in SIGNALS:
                    signal.signal(each, signal.SIG_DFL)  # torchrun's, once rank 0 has failed, ends it in silence
                time.sleep(self.SECONDS_BEHIND_RANK_ZERO)
            message = hanging or self.message(error)
            message = message and f"error: {message}"
        if message is None:
            sys.__excepthook__(kind, error, trace)
        elif code == 1 or number == 0:
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()  # else the message would stand at the end of a bar's line
            print(message, file=sys.stderr)
        if world_size() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the interpreter's own end would first wait for the process group
        if code != 1:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise where its workers end
            for worker in multiprocessing.active_children():
                worker.kill()  # torch would wait seconds for each
            raise SystemExit(code)

    def interruption(self, error: BaseException) -> str | None:
        """The line on a signal that has ended the run, or None where none has."""
        if isinstance(error, Interrupted):
            return str(error)
        handler = EndOnSignal.current()
        if handler is None or handler.received is None or self.message(error) is not None:
            return None
        # what else breaks after a signal, such as the connection to a process that it has ended, breaks by it
        while error.__cause__ is not None:  # MONAI wraps it
            error = error.__cause__
        name, cause = signal.Signals(handler.received).name, f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name}: ended in the midst of a step ({cause}); the same command goes on from the last checkpoint"

    def message(self, error: BaseException) -> str | None:
        """The line that says what to do, or None where there is none."""
        # a data loader's worker sends its exception as text, so the text is what can be searched
        text = "".join(traceback.format_exception(error))
        if found := self.PATTERN.findall(text):
            return found[-1]  # a worker's own stands behind "InputError: Caught InputError in DataLoader worker"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):  # by another name
                return str(cause)
            cause = cause.__cause__ or cause.__context__
        if found := self.DISK.search(text):
            return f"the disk is full ({found[1]}): free space in models_dir and output_dir and start the same again"
        if found := self.DEATH.search(text):
            return (
                f"process {found[1]}, a data loader's worker, {found[2]}, as it is where memory runs out: give fewer "
                "num_workers; the same command goes on from the last checkpoint"
            )
        return None
