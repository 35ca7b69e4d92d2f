"""Processes of their own, of which the imports are made once.

Most of the time of a short process is the import of Keras and of a framework.
`python(folder)` returns a program to be called as `sys.executable` is, with
`-m`, `-c` or a script. What it runs is a fork of a process that has imported
what `PRELOADED` names and has done nothing else: no model, no device, no
thread, and nothing of this library. Arguments, environment, streams, working
folder and exit status are as usual, and whoever ends the program ends the
fork.

What frameworks read from the environment while they are imported decides which
process is forked, so that there may be several. They end with their owner.

A test for which the import itself is the point takes `sys.executable`.
"""

import array
import fcntl
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys

# Keras imports TensorFlow on every backend, to seed it as well.
PRELOADED = {
    "tensorflow": ("tensorflow", "keras"),
    "jax": ("tensorflow", "keras"),
    "torch": ("tensorflow", "torch.distributed", "keras"),
}
# Names of variables that are read while something is imported, how they begin.
READ_BY_IMPORTS = (
    "CUDA JAX KERAS LD_ MKL NPROC OMP OPENBLAS PJRT PYTHON PYTORCH TF TORCH XLA"
).split()
SAFE = ("PYTHONPATH", "TF_CONFIG")  # these may differ
POLL = 0.02  # seconds


def python(folder):
    """Writes the program into an empty folder, and returns its path.

    Forks need Linux or a Unix like it; elsewhere it is Python itself.
    """
    if sys.platform != "linux":
        return sys.executable
    path = folder / "python"
    command = [sys.executable, "-IS", __file__, str(folder), str(os.getpid())]
    words = " ".join(map(shlex.quote, command))
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)
    return str(path)


def ask(folder, owner, arguments):
    """Has a fork do what Python would with these arguments, and ends as it."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "program": os.path.join(folder, "python"),
    }
    message = json.dumps(request).encode()
    with connect(folder, owner) as connection:
        streams = array.array("i", [0, 1, 2])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)
        connection.sendmsg([len(message).to_bytes(8, "big")], [rights])
        connection.sendall(message)
        status = connection.recv(8)
    if not status:
        raise SystemExit("The process that forks has ended.")
    status = int.from_bytes(status, "big", signed=True)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    raise SystemExit(status)


def connect(folder, owner):
    """Returns a connection to the process that forks, maybe a new one."""
    imports = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(tuple(READ_BY_IMPORTS)) and name not in SAFE
    }
    key = hashlib.sha256(json.dumps(imports).encode()).hexdigest()[:8]
    address = os.path.join(folder, key)
    connection = socket.socket(socket.AF_UNIX)
    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(address):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen(16)
            # Those of OpenBLAS would begin with the import of NumPy.
            environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
            environment.pop("PYTHONPATH", None)
            with open(f"{address}.log", "w") as log:
                subprocess.Popen(
                    [sys.executable, __file__, "serve", owner]
                    + [str(listener.fileno())],
                    env=environment,
                    cwd=folder,
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        connection.connect(address)
    return connection


def serve(owner, listener):
    """Forks for everyone who asks, while the owner lives.

    Returns in the forks only, what they are asked for.
    """
    import gc
    import importlib
    import warnings

    # Of what JAX says about forks, nothing applies: it has no threads yet.
    warnings.simplefilter("ignore")
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    for name in PRELOADED[backend]:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork needs one thread"
    gc.collect()
    gc.freeze()
    listener.settimeout(POLL)
    running = {}
    while alive(owner):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            pass
        else:
            request, streams = receive(connection)
            if request is not None:
                pid = os.fork()
                if not pid:
                    for other in (listener, connection, *running.values()):
                        other.close()
                    return request, streams
                running[pid] = connection
            for stream in streams:
                os.close(stream)
        look_after(running)
    for pid in running:
        end(pid)
    raise SystemExit


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def receive(connection):
    """Returns a request and the streams that came with it."""
    connection.settimeout(10)
    try:
        size, streams, *_ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as file:
            return json.loads(file.read(int.from_bytes(size, "big"))), streams
    except (OSError, ValueError):
        return None, []
    finally:
        connection.setblocking(False)


def look_after(running):
    """Reports what has ended, and ends what nobody waits for any more."""
    for pid, connection in list(running.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(status)
            try:
                connection.sendall(status.to_bytes(8, "big", signed=True))
            except OSError:
                pass
        else:
            try:
                if connection.recv(1):
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            end(pid)
        connection.close()
        del running[pid]


def end(pid):
    for kill, whom in ((os.killpg, pid), (os.kill, pid)):
        try:
            kill(whom, signal.SIGKILL)
        except ProcessLookupError:
            pass
    os.waitpid(pid, 0)


def become(request, streams):
    """Makes of this fork the process that was asked for; returns its code."""
    import random

    import numpy as np

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    np.random.seed()
    sys.executable = request["program"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # The first one is the folder of this file.
    sys.path[0:1] = [path for path in paths if path]
    return request["arguments"]


def run(arguments):
    """Does what Python does with these arguments."""
    import runpy

    kind, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        # As the first module, whose names others may look for.
        names = sys.modules["__main__"].__dict__
        names["__doc__"] = None
        exec(compile(rest[0], "<string>", "exec"), names)
    elif kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _, _, owner, number = sys.argv
        run(become(*serve(int(owner), socket.socket(fileno=int(number)))))
    else:
        ask(sys.argv[1], sys.argv[2], sys.argv[3:])
