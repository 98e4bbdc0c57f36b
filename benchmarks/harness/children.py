"""Stages and checks in processes of their own: a crash, an illegal access or a hang costs its own
rows and nobody else's.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.device"]


def run(spec, seconds):
    """(rows it emitted, how it ended badly or None) of `device.py --child` with this spec; killed
    after so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        process = subprocess.Popen(
            [*COMMAND, "--child", json.dumps(spec | {"rows": str(rows)})],
            stdout=sys.stderr,
            cwd=ROOT,
            start_new_session=True,
        )
        ended = None
        try:
            code = process.wait(max(1, seconds))
            if code:
                ended = (
                    "its process ended "
                    f"with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
                )
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [
            json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")
        ], ended


def emitter(path):
    """emit(row): visible to the parent at once, also if this process dies right after."""

    def emit(row):
        with Path(path).open("a") as stream:
            stream.write(json.dumps(row, allow_nan=False) + "\n")

    return emit


def left(deadline):
    return deadline - time.monotonic()
