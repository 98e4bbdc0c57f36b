"""Where the numbers of a result file come from: the machine, its versions, the state of its GPU. No
paths and no host names.
"""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from miue_fast.dispatch.environment import build_flags, cpu_level


def environment():
    """All of it, as the result files hold it."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = _git("rev-parse", "HEAD") or None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "miue_fast": _version("miue_fast"),
        "build_flags": build_flags(),
        "cpu_level": cpu_level(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        **({"device": _device()} if torch.cuda.is_available() else {}),
        "commit": commit,
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "-uno", "--", ":(exclude)results")
        )
        if commit
        else None,
    }


GPU_STATE = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def gpu_state():
    """What nvidia-smi reads about the GPU now, or None. Only reads."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [v.strip() for v in done.stdout.strip().split(",")]
    return (
        dict(zip(GPU_STATE, values))
        if done.returncode == 0 and len(values) == len(GPU_STATE)
        else None
    )


def _device():
    found = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "state": gpu_state(),
    }


def _git(*words):
    if not shutil.which("git"):
        return ""
    return subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()


def lines(path):
    """Of a file in /proc, or none."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None
