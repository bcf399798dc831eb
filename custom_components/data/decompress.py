"""Decompresses DICOM files in a process of its own, since GDCM ends its process by some of the damaged ones."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.pixels import pixel_array

TIMEOUT = 60, 5  # s, and s a file


def decompressed(paths: Sequence[Path]) -> list[np.ndarray | str]:
    """Voxels of each file as stored, or why there are none."""
    # -P: the modules beside this one, such as nrrd, are not to hide packages of their name
    limit = TIMEOUT[0] + TIMEOUT[1] * len(paths)
    command = [sys.executable, "-P", __file__, str(limit)]
    names = b"\0".join(os.fsencode(path.absolute()) for path in paths)
    try:
        done = subprocess.run(
            command, input=names, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"it is not decompressed after {limit} s"] * len(paths)
    answers, found = io.BytesIO(done.stdout), []
    try:
        for _ in paths:
            answer = np.load(answers, allow_pickle=False)
            found.append(str(answer) if answer.dtype.kind == "U" else answer)
    except (EOFError, ValueError):
        found.append(f"its decompression ends its process (exit code {done.returncode})")
    return found


def main() -> None:
    signal.alarm(int(sys.argv[1]))  # ends it where the process that waits for it was killed
    import gdcm  # noqa: F401  by which pydicom decompresses JPEG, JPEG-LS and JPEG 2000

    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what the libraries print is no answer
        for name in sys.stdin.buffer.read().split(b"\0"):
            try:
                answer = pixel_array(os.fsdecode(name))
            except Exception as error:
                answer = np.array(str(error).splitlines()[0] if str(error) else type(error).__name__)
            buffer = io.BytesIO()  # since NumPy seeks in files, and a pipe has no places
            np.save(buffer, answer, allow_pickle=False)
            answers.write(buffer.getbuffer())
            answers.flush()


if __name__ == "__main__":
    main()
