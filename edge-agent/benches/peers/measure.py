"""What a process tree costs, and a broker that counts what is sent to it."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from paho.mqtt.client import CallbackAPIVersion, Client

SAMPLE_S = 0.1
SYS_INTERVAL_S = 1
GRACE_S = 1  # for a peer that ends by itself once it is done
DONE = "done"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Cost:
    """Of one run: CPU time of user and kernel, of the process and of the children that it waited for."""

    cpu_s: float
    wall_s: float
    peak_rss_bytes: int
    peak_pss_bytes: int
    wire_bytes: int = 0


class Broker:
    """A mosquitto on a free port, and a subscriber that keeps what is published."""

    def __init__(self, folder):
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if not program:
            raise SystemExit("mosquitto is not installed; apt-get install mosquitto")
        self.port = free_port()
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n"
            f"max_inflight_messages 1000\nsys_interval {SYS_INTERVAL_S}\nlog_type error\n")
        self.process = subprocess.Popen([program, "-c", config])
        self.messages, self.received, self.done = [], 0, threading.Event()
        self.tap = Client(CallbackAPIVersion.VERSION2)
        self.tap.on_message = self._on_message
        self._connect()
        self.tap.subscribe([("#", 0), ("$SYS/broker/bytes/received", 0)])
        self.tap.loop_start()

    def _connect(self):
        for _ in range(50):
            try:
                return self.tap.connect("127.0.0.1", self.port, keepalive=3600)
            except ConnectionRefusedError:
                time.sleep(0.1)
        raise SystemExit(f"mosquitto does not listen on 127.0.0.1:{self.port}")

    def _on_message(self, _client, _userdata, message):
        if message.topic.startswith("$SYS"):
            self.received = int(message.payload)
            return
        self.messages.append(message)
        if message.topic.endswith(f"/{DONE}"):
            self.done.set()

    def settled(self):
        """Bytes that the broker has received at its sockets so far; the subscriber itself sends next to none."""
        time.sleep(2.5 * SYS_INTERVAL_S)
        return self.received

    def take(self):
        """The messages since the last call."""
        taken, self.messages = self.messages, []
        self.done.clear()
        return taken

    def close(self):
        self.tap.disconnect()
        self.tap.loop_stop()
        self.process.terminate()
        self.process.wait()


def run(name, command, broker, *, env, cwd, limit_s):
    """Runs a command to its end, or until it has said that it is done; then it is told to end.

    Returns what it cost and what it published.
    """
    log = Path(cwd) / "log"
    before = broker.settled()
    broker.take()
    with open(log, "wb") as out:
        begun = time.monotonic()
        process = subprocess.Popen(command, env=os.environ | env, cwd=cwd, stdout=out, stderr=out)
        peaks, done, told = Peaks(process.pid), None, False
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid != 0:
                    break
                peaks.sample()
                if broker.done.wait(SAMPLE_S):
                    done = done or time.monotonic()
                    time.sleep(SAMPLE_S)
                if time.monotonic() - begun > limit_s:
                    raise SystemExit(f"{name} is not done after {limit_s} s; its log ends with:\n{_tail(log)}")
                # A peer that is a server does not end by itself.
                if done and not told and time.monotonic() - done > GRACE_S:
                    process.terminate()
                    told = True
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    if process.returncode not in (0, -signal.SIGTERM):
        raise SystemExit(f"{name} ended with {process.returncode}; its log ends with:\n{_tail(log)}")
    wall = (done or time.monotonic()) - begun
    wire = broker.settled() - before
    cost = Cost(usage.ru_utime + usage.ru_stime, wall, peaks.rss, peaks.pss, wire)
    return cost, broker.take()


def _tail(log):
    return log.read_text(errors="replace")[-2000:]


class Peaks:
    """The most memory that a process and its descendants were seen to hold at once."""

    def __init__(self, root):
        self.root, self.rss, self.pss = root, 0, 0

    def sample(self):
        rss = pss = 0
        for pid in self._tree():
            try:
                now_pss = _kibibytes(f"/proc/{pid}/smaps_rollup", "Pss")
                # The kernel keeps the peak of each process by itself.
                high_rss = _kibibytes(f"/proc/{pid}/status", "VmHWM")
            except (OSError, StopIteration):
                continue  # It has just ended.
            pss, rss = pss + now_pss, rss + high_rss
        self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)

    def _tree(self):
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text()
                except OSError:
                    continue
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        tree = [self.root]
        for pid in tree:
            tree += [child for child, parent in parents.items() if parent == pid]
        return tree


def _kibibytes(file, key):
    """The line `KEY: N kB` of a file of /proc, in bytes."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
