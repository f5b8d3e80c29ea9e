#!/usr/bin/env python3
"""Measures cloud-ingest against its peers on single JSON messages: from the broker's queue to committed rows, in one run.

    python3 cloud-ingest/benches/peers/run.py --bin target/release --messages 300000

A mosquitto queues the same messages, one reading each, for everybody; then one after the other takes them:

| peer | what |
|---|---|
| `null` | mosquitto_sub, which acknowledges and forgets: what the broker delivers |
| `cloud-ingest` | the shipped binary (ingest, refine): bronze, checks, exact de-duplication, silver, gold |
| `script` | script.py: paho-mqtt, orjson, pyarrow, deltalake |
| `bytewax` | bytewax_flow.py: the same as a Bytewax dataflow |
| `pathway` | pathway_flow.py: Pathway's own connectors for MQTT and Delta |

The peers write one table and look for no duplicates; cloud-ingest does all it does. CPU time is that of the process
and its children. The rows of everybody's table are counted; a difference fails the run.

Needs mosquitto, mosquitto-clients and Python 3.11 or later; installs the rest into ~/.cache/tailrace/cloud-peers. The
last line is one JSON object.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "tailrace" / "cloud-peers"
PYTHON = CACHE / "venv" / "bin" / "python"
PEERS = {"script": "script.py", "bytewax": "bytewax_flow.py", "pathway": "pathway_flow.py"}
LIMIT_S = 600
DEVICES = 200


def install():
    """Brings the venv up to what requirements.txt says, and goes on in it."""
    wanted, stamp = HERE / "requirements.txt", CACHE / "installed"
    digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"installing into {CACHE}: a minute or so", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", CACHE / "venv"], check=True)
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", wanted]
        subprocess.run([PYTHON, *pip], check=True)
        stamp.write_text(digest)
    if Path(sys.prefix).resolve() != (CACHE / "venv").resolve():
        os.execv(PYTHON, [PYTHON, *sys.argv])


def program(name, package):
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    return found or sys.exit(f"{name} is not installed; apt-get install {package}")


@contextlib.contextmanager
def started(command, log, **options):
    with open(log, "ab") as out:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out, **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def ended(process, name, log, deadline):
    """Waits for a process; returns its CPU seconds and peak RSS."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            sys.exit(f"{name} is not done after {LIMIT_S} s; see {log}")
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{name} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def metric(port, pattern):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            text = response.read().decode()
    except OSError:
        return 0.0
    return sum(float(value) for value in re.findall(rf"(?m)^{pattern}(?:\{{[^}}]*\}})? (\S+)$", text))


def row(name, messages, seconds, cpu, rss, rows):
    return {"peer": name, "messages": messages, "rows": rows, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
            "messages_per_second": round(messages / seconds), "messages_per_cpu_second": round(messages / cpu),
            "peak_rss_bytes": rss}


def take(name, command, messages, folder):
    """Runs whatever ends by itself once it has taken everything."""
    log, began = folder / f"{name}.log", time.monotonic()
    with started(command, log, cwd=folder) as process:
        cpu, rss = ended(process, name, log, began + LIMIT_S)
    return time.monotonic() - began, cpu, rss


def rows_of(table):
    from deltalake import DeltaTable

    return DeltaTable(str(table)).to_pyarrow_dataset().count_rows()


class Cloud:
    def __init__(self, binary, mqtt, http, pg, folder):
        self.http, self.lake, self.log = http, folder / "lake", folder / "cloud.log"
        config = folder / "cloud.toml"
        config.write_text(
            f'[store]\nurl = "file://{self.lake}"\n[mqtt]\nurl = "mqtt://127.0.0.1:{mqtt}"\n'
            f"[serve]\npg_port = {pg}\nhttp_port = {http}\n")
        self.command = [binary, "run", "--config", config]

    def until(self, process, done, what):
        deadline = time.monotonic() + LIMIT_S
        while not done():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"cloud-ingest: {what} did not happen; see {self.log}")
            time.sleep(0.1)

    def subscribe(self):
        with started(self.command, self.log) as process:
            self.until(process, lambda: metric(self.http, "tailrace_cloud_mqtt_connected") > 0, "the connection")
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            ended(process, "cloud-ingest", self.log, time.monotonic() + 60)

    def take(self, messages):
        began = time.monotonic()
        with started(self.command, self.log) as process:
            done = lambda: metric(self.http, "tailrace_cloud_readings_total") >= messages
            self.until(process, done, "silver with everything")
            seconds = time.monotonic() - began
            process.send_signal(signal.SIGTERM)
            cpu, rss = ended(process, "cloud-ingest", self.log, time.monotonic() + 60)
        return seconds, cpu, rss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--bin", type=Path, required=True, help="folder with cloud-ingest and firmware-sim, release builds")
    option("--messages", type=int, default=300_000, help="of one reading each (default %(default)s)")
    option("--only", metavar="NAMES", help="some of them, by commas (default all)")
    options = parser.parse_args()
    for name in ("cloud-ingest", "firmware-sim"):
        if not (options.bin / name).exists():
            parser.error(f"{options.bin / name} is not there")
    install()
    from uplink import TOPIC, WINDOW, subscribe

    sys.path.append(str(HERE.parents[2] / "deploy" / "judges"))
    from process import free_port, wait_for_port

    names = options.only.split(",") if options.only else ["null", "cloud-ingest", *PEERS]
    messages, result = options.messages, []
    with tempfile.TemporaryDirectory(prefix="tailrace-peers-") as scratch:
        scratch, mqtt = Path(scratch), free_port()
        config = scratch / "mosquitto.conf"
        config.write_text(f"listener {mqtt} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n"
                          "max_queued_bytes 0\nmax_inflight_messages 0\nlog_type error\n")
        with started([program("mosquitto", "mosquitto"), "-c", config], scratch / "mosquitto.log") as broker:
            if not wait_for_port(mqtt, 20, broker):
                sys.exit("mosquitto does not listen")
            cloud = Cloud(options.bin.resolve() / "cloud-ingest", mqtt, free_port(), free_port(), scratch)
            null = [program("mosquitto_sub", "mosquitto-clients"), "-V", "mqttv5", "-p", mqtt, "-i", "null", "-c", "-x",
                    "3600", "-q", "1", "-t", TOPIC, "-D", "connect", "receive-maximum", WINDOW, "-F", ""]
            for name in names:
                if name == "null":
                    subprocess.run([str(part) for part in [*null, "-E"]], check=True)
                elif name == "cloud-ingest":
                    cloud.subscribe()
                else:
                    subscribe(name, mqtt)
            print(f"the broker takes {messages} messages", file=sys.stderr, flush=True)
            fleet = [options.bin / "firmware-sim", "fleet", "--url", f"mqtt://127.0.0.1:{mqtt}", "--format", "json",
                     "--batch", "1", "--gateways", "2", "--devices", DEVICES // 2, "--readings", messages]
            subprocess.run([str(part) for part in fleet], check=True, stdout=subprocess.DEVNULL)
            for name in names:
                print(name, file=sys.stderr, flush=True)
                if name == "null":
                    cost, rows = take(name, [*null, "-C", messages], messages, scratch), messages
                elif name == "cloud-ingest":
                    cost = cloud.take(messages)
                    rows = rows_of(cloud.lake / "silver" / "sensor_readings")
                else:
                    table = scratch / name
                    cost = take(name, [PYTHON, HERE / PEERS[name], mqtt, table, messages], messages, scratch)
                    rows = rows_of(table)
                result.append(row(name, messages, *cost, rows))
                print(json.dumps(result[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"messages": messages, "peers": result}))
    sys.exit(any(one["rows"] != messages for one in result))


if __name__ == "__main__":
    main()
