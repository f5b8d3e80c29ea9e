"""Child processes of the judges: ended by their own pid, on free ports."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time

# Below those that systems give to outgoing connections (32,768 and up on Linux): nobody takes one of these between
# being found free and being listened on. Each judge begins somewhere else, and none is given out twice.
_first = 10_000 + os.getpid() * 37 % 10_000
_candidates = itertools.chain(range(_first, 20_000), range(10_000, _first))


def free_port():
    """A port that nobody listens on, another at each call."""
    for port in _candidates:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 10000 and 19999")


def wait_for_port(port, seconds, process=None):
    """Waits until something accepts connections; False when nothing does in time or `process` has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            return False
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.1)
    return False


def descendants(pid):
    """Pids below `pid` that are alive now, found by /proc."""
    children = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def started_at(pid):
    """When a pid's process began, in ticks since boot; None when there is none. Tells a reused pid apart."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
        fields = f.read().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    return None


@contextlib.contextmanager
def running(command, log, **options):
    """Runs a command with its output in `log`; whatever of it is left at the end is killed."""
    options.setdefault("stdin", subprocess.DEVNULL)
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            below = [(pid, started_at(pid)) for pid in descendants(process.pid)]
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid, began in below:
                if began is not None and started_at(pid) == began:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
