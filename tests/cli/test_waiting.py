"""The program's own processes wait passively on a busy machine; `import miue_fast` changes nothing
in anybody else's.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miue_fast import data
from miue_fast._waiting import own_process

COMMAND = Path(sys.executable).with_name("miue-fast")
PROGRAM = {
    "miue-fast": [COMMAND, "--version"],
    "cli": [sys.executable, "-m", "miue_fast", "--version"],
    "cli with options of Python": [sys.executable, "-W", "error", "-mmiue_fast", "--version"],
    "demo": [sys.executable, "-m", "miue_fast", "demo", "--help"],
}
OTHERS = {
    "import": [sys.executable, "-c", "import miue_fast", "miue_fast"],
    "cli as a function": [
        sys.executable,
        "-c",
        "from miue_fast import cli; cli.main(['info'])",
        "-m",
        "miue_fast",
    ],
}


def spins(command, **variables):
    """How often each OpenMP library of the process looks before it sleeps, as the libraries
    themselves say.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**env, "OMP_DISPLAY_ENV": "verbose", **variables},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = {int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)}
    if not found:
        pytest.skip("no libgomp in this build of torch")
    return found


@pytest.mark.parametrize("name", PROGRAM)
def test_the_program_waits_passively(name):
    assert spins(PROGRAM[name]) == {0}


@pytest.mark.parametrize("name", OTHERS)
def test_nobody_else_does(name):
    assert 0 not in spins(OTHERS[name])


def test_the_users_own_choice_wins():
    assert 0 not in spins(PROGRAM["cli"], OMP_WAIT_POLICY="active")
    assert spins(PROGRAM["cli"], GOMP_SPINCOUNT="77") == {77}


def test_whose_process_it_is():
    """(sys.orig_argv, sys.argv while the package is imported)."""
    own = [
        (["python", "-m", "miue_fast", "generate"], ["-m", "generate"]),
        (["python", "-X", "dev", "-mmiue_fast"], ["-m"]),
        (["python", "-m", "miue_fast"], ["-m"]),
        (["python", "/usr/bin/miue-fast", "info"], ["/usr/bin/miue-fast", "info"]),
    ]
    others = [
        (["python", "-m", "theirs", "miue_fast"], ["-m", "miue_fast"]),
        (["python", "-m", "theirs", "-m", "miue_fast"], ["-m", "-m", "miue_fast"]),
        (["python", "-m", "miue_fast.report"], ["-m"]),
        (["python", "miue-fast/train.py"], ["miue-fast/train.py"]),
        (["python", "miue-fast.py"], ["miue-fast.py"]),
        (["python"], [""]),
        ([], []),
        (["python"], ["-m", "several", "words"]),
        ([], ["-m"]),
    ]
    assert all(own_process(*case) for case in own)
    assert not any(own_process(*case) for case in others)


IMPORT = """
import json, logging, os, random, signal, sys, threading, warnings
import numpy, PIL.Image, safetensors.torch, torch, tqdm

def state():
    loggers = {name: logging.getLogger(name) for name in ("", "miue_fast", "py.warnings")}
    return {
        "environment": dict(os.environ), "path": list(sys.path), "argv": list(sys.argv), \
"folder": os.getcwd(),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, \
threading.excepthook, sys.meta_path, sys.path_hooks)],
        "limits": [sys.getrecursionlimit(), sys.get_int_max_str_digits(), \
sys.getswitchinterval(), PIL.Image.MAX_IMAGE_PIXELS],
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "logging": [[log.level, log.propagate, log.disabled, repr(log.handlers), \
repr(log.filters)] for log in loggers.values()],
        "logging as a whole": [logging.root.manager.disable, \
repr(logging.getLoggerClass()), repr(logging.lastResort)],
        "warnings": [repr(warnings.filters), repr(warnings.showwarning)],
        "random states": [hash(random.getstate()), \
repr(numpy.random.get_state()), torch.get_rng_state().tolist()],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), \
threading.active_count()],
        "torch": [
            repr(value()) for value in (
                torch.get_default_dtype, torch.get_default_device, \
torch.is_grad_enabled, torch.is_inference_mode_enabled,
                torch.are_deterministic_algorithms_enabled, \
torch.get_float32_matmul_precision, torch.is_autocast_enabled,
                torch.is_warn_always_enabled, torch.is_anomaly_enabled,
            )
        ],
        "backends": [
            torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, \
torch.backends.cudnn.deterministic, torch.backends.mkldnn.enabled,
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, \
torch.utils.deterministic.fill_uninitialized_memory,
        ],
        "numpy's errors": numpy.geterr(), "patches": [repr(torch.nn.Module.__call__), \
repr(torch.load), repr(torch.save), repr(numpy.load)],
    }

before = state()
import miue_fast, miue_fast.cli, miue_fast.report
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def test_importing_changes_nothing():
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads(done.stdout) == []


def test_importing_it_before_torch_leaves_the_environment():
    """What torch itself sets is subtracted."""
    code = (
        "import os, sys; before = dict(os.environ); import {}; "
        "print(sorted(set(os.environ.items()) ^ set(before.items())))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    told = [
        subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, env=env
        )
        for name in ("torch, numpy, PIL.Image, safetensors.torch, tqdm", "miue_fast")
    ]
    assert all(done.returncode == 0 for done in told), told
    assert told[0].stdout == told[1].stdout


WORKER = """
import multiprocessing, os
import miue_fast

def told():
    print(os.environ.get("OMP_WAIT_POLICY"))

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=told)
    worker.start()
    worker.join()
"""


def test_workers_inherit_it(tmp_path):
    """As those of `report --jobs`, whose processes are spawned too."""
    (tmp_path / "miue-fast").write_text(WORKER)
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "miue-fast"],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.stdout == "PASSIVE\n", done.stderr


def test_two_threads_beside_busy_processes_do_little_more_than_one(tmp_path):
    """Coarse, in processor seconds, which other programs hardly change: threads that spin for each
    other use several times as many. benchmarks/studies/busy.py measures the wall time."""
    shapes = data.shapes(400, seed=0, size=32, difficulty=0)
    data.export_npz(shapes, shapes.images * 0.0, tmp_path / "shapes.npz", eps=0)
    words = [
        "--data",
        tmp_path / "shapes.npz",
        "--model",
        "small_resnet",
        "--epochs",
        "1",
        "--steps",
        "4",
        "--batch",
        "50",
        "--quiet",
    ]
    command = [sys.executable, "-m", "miue_fast", "generate", *words]
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "GOMP_", "KMP_"))
    }
    hogs, used = [], {}
    try:
        for _ in range(os.cpu_count()):
            hogs.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        for threads in ("1", "2"):
            before = os.times()
            subprocess.run(
                [*command, "--out", tmp_path / threads],
                check=True,
                env={**env, "OMP_NUM_THREADS": threads},
                timeout=300,
            )
            after = os.times()
            used[threads] = (
                after.children_user
                + after.children_system
                - before.children_user
                - before.children_system
            )
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert used["2"] < 1.6 * used["1"], used
