#!/usr/bin/env python3
"""Measures the edge agent against its peers: the same job by Node-RED and by a Python script, in one run.

    firmware-sim bench edge --devices 200 --readings 20000000 --data-dir D
    python3 edge-agent/benches/peers/run.py --data-dir D --agent target/gateway/edge-agent

D is what the bench has left: rows.csv (200 devices at 10 Hz), edge-agent.toml, models/level-shift. The job: read the
table from memory, check ranges, apply the deadband, aggregate every device a minute, score every machine once a
second with the shipped network, raise anomalies, publish it all with QoS 1 to a mosquitto on loopback, a message for
every second of readings.

| peer | what |
|---|---|
| `agent` | the shipped binary with D/edge-agent.toml, outbox and all; the whole table |
| `python` | python_peer.py, tuned: pandas, onnxruntime, paho-mqtt |
| `node-red` | node_red/, tuned: `file in`, function nodes, `mqtt out`, onnxruntime-node |
| `python-lean`, `node-red-lean` | the same with JSON as lean as it gets, which cloud-ingest cannot read (job.py) |
| `python-usual` | python_usual.py: as such a script is usually written, pandas for every step |
| `node-red-usual` | node_red_usual/: as such a flow is usually built, a message a reading |

The peers take the first `--readings` of the table, since their rate is what counts; the usual ones at most 400,000.
Everyone runs twice, on the first seconds of the table and then on all of it: the difference is the rate without
start-up. CPU time is that of the process tree, and none of the broker's or of this driver's. Everything that is
published is compared with what expected.py makes of the same table; a difference fails the run.

Needs mosquitto, npm and Python 3.11 or later; installs the rest into ~/.cache/tailrace/peers (1.1 GB). The last line
is one JSON object. Exit status 0 when all work was right, 1 otherwise.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "tailrace" / "peers"
PYTHON = CACHE / "venv" / "bin" / "python"
NODE_MODULES = CACHE / "node" / "node_modules"
USUAL_READINGS = 400_000  # of the table, for the usual peers: more take minutes
START_S = 12  # of the table, for the short run
LIMIT_S = 600  # of a run; it is a matter of seconds


if sys.version_info < (3, 11):
    sys.exit(f"this is Python {platform.python_version()}; run it with 3.11 or later")


def install():
    """Brings ~/.cache/tailrace/peers up to what requirements.txt and package.json say."""
    def step(name, wanted, *commands):
        stamp = CACHE / f"{name}.installed"
        digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == digest:
            return
        print(f"installing {name} into {CACHE / name}: a minute or so", file=sys.stderr, flush=True)
        (CACHE / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(wanted, CACHE / name)
        for command in commands:
            try:
                done = subprocess.run(command, cwd=CACHE / name, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT)
            except FileNotFoundError:
                sys.exit(f"{command[0]} is not installed; apt-get install {command[0]}")
            if done.returncode != 0:
                sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n"
                         f"remove {CACHE / name} and try again")
        stamp.write_text(digest)

    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt"]
    step("venv", HERE / "requirements.txt", [sys.executable, "-m", "venv", "."], [PYTHON, *pip])
    # Scripts would fetch GPU libraries from elsewhere; what is needed lies in the packages.
    npm = ["npm", "install", "--no-fund", "--no-audit", "--ignore-scripts"]
    step("node", HERE / "node_red" / "package.json", npm)


def in_venv():
    """Goes on in the venv, which has what the driver itself imports."""
    if Path(sys.prefix).resolve() != (CACHE / "venv").resolve():
        os.execv(PYTHON, [PYTHON, *sys.argv])


def python(script, job, folder):
    (folder / "job.json").write_text(json.dumps(job))
    return [PYTHON, HERE / script, folder / "job.json"], {}


def node_red(flow, job, folder):
    from measure import free_port

    (folder / "job.json").write_text(json.dumps(job))
    shutil.copy(HERE / "node_red" / "settings.js", folder)
    nodes = json.loads((HERE / flow / "flow.json").read_text())
    for node in nodes:
        if node["type"] == "function":
            at_start, on_message = (HERE / flow / node["func"]).read_text().split("// --- on message\n")
            node |= {"initialize": at_start, "func": on_message}
    (folder / "flows.json").write_text(json.dumps(nodes))
    architecture = {"x86_64": "x64", "aarch64": "arm64"}[platform.machine()]
    node = NODE_MODULES / f"node-linux-{architecture}" / "bin" / "node"
    env = {"JOB": str(folder / "job.json"), "ROWS": job["rows"], "MQTT_PORT": str(job["port"]),
           "HTTP_PORT": str(free_port()), "NODE_PATH": str(NODE_MODULES)}
    return [node, NODE_MODULES / "node-red" / "red.js", "--settings", folder / "settings.js"], env


def agent(job, folder, binary, data_dir):
    text = (data_dir / "edge-agent.toml").read_text()
    text, replaced = re.subn(r"(?m)^file\s*=.*$", f"file = {json.dumps(job['rows'])}", text)
    if replaced != 1:
        sys.exit(f"{data_dir}/edge-agent.toml has {replaced} lines that begin with file =, not one, in [[replay]]")
    (folder / "edge-agent.toml").write_text(text)
    env = {
        "MQTT__URL": f"mqtt://127.0.0.1:{job['port']}",
        "DATA_DIR": str(folder / "data"),
        "MODELS__DIR": str(Path(job["model"]).parents[1]),
        "METRICS__LISTEN": "",
        # Nobody acknowledges but the broker, and everything is to be sent before it ends.
        "UPLINK__MODE": "broker",
        "UPLINK__DRAIN": f"{LIMIT_S}s",
    }
    command = [binary, "run", "--config", folder / "edge-agent.toml"]
    return command, {f"TAILRACE_EDGE__{key}": value for key, value in env.items()}


def measure_one(name, prepare, job, readings, check, broker, scratch):
    """Runs a peer on the beginning of the table and on `readings` of it; returns its row of the table."""
    import measure
    from expected import expect
    from job import cut

    devices = len(job["devices"])
    costs = []
    for part, wanted in (("start", START_S * 10 * devices), ("all", readings)):
        folder = scratch / f"{name}-{part}"
        folder.mkdir()
        rows = folder / "rows.csv"
        given = cut(job["rows"], wanted, devices, rows)
        part_job = job | {"rows": str(rows), "topic": f"peers/{name}"}
        print(f"{name}: {given} readings", file=sys.stderr, flush=True)
        command, env = prepare(part_job, folder)
        cost, messages = measure.run(name, command, broker, env=env, cwd=folder, limit_s=LIMIT_S)
        costs.append((given, cost))
        wrong = check(expect(part_job, given), messages)
        shutil.rmtree(folder)
        if wrong:
            break
    (start, short), (given, whole) = costs[0], costs[-1]
    row = {
        "peer": name, "readings": given, "cpu_seconds": round(whole.cpu_s, 3), "seconds": round(whole.wall_s, 3),
        "start_cpu_seconds": round(short.cpu_s, 3), "start_readings": start,
        "readings_per_cpu_second": round(given / whole.cpu_s),
        "peak_rss_bytes": whole.peak_rss_bytes, "peak_pss_bytes": whole.peak_pss_bytes,
        "bytes_per_reading": round(whole.wire_bytes / given, 2), "messages": len(messages), "wrong": wrong,
    }
    if given > start and whole.cpu_s > short.cpu_s:
        row["readings_per_cpu_second_without_start"] = round((given - start) / (whole.cpu_s - short.cpu_s))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data-dir", type=Path, required=True, help="what firmware-sim bench edge --data-dir has left")
    option("--readings", type=int, default=2_000_000, help="of the table, for the peers (default %(default)s)")
    option("--agent", type=Path, help="the edge-agent binary, a release build; without it only the peers")
    option("--agent-readings", type=int, default=sys.maxsize, help="of the table, for the agent (default all)")
    option("--only", metavar="NAMES", help="some of them, by commas (default all)")
    options = parser.parse_args()
    needed = [options.data_dir / "edge-agent.toml", options.data_dir / "rows.csv"]
    for file in needed + ([options.agent] if options.agent else []):
        if not file.exists():
            parser.error(f"{file} is not there")
    install()
    in_venv()

    from expected import check_arrow, check_json, golden
    from job import load
    from measure import Broker

    # So that whatever was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    data_dir = options.data_dir.resolve()
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tailrace-peers-", dir=shm) as scratch:
        scratch = Path(scratch)
        broker = Broker(scratch)
        try:
            job = load(data_dir) | {"port": broker.port}
            print(f"golden vectors: {golden(job)} reproduced by onnxruntime", file=sys.stderr)
            ours = lambda job, folder: agent(job, folder, options.agent.resolve(), data_dir)
            peers = {"agent": (ours, job, options.agent_readings, check_arrow)} if options.agent else {}
            usual = min(options.readings, USUAL_READINGS)
            for name, prepare, tuned_as, usual_as in (("python", python, "python_peer.py", "python_usual.py"),
                                                      ("node-red", node_red, "node_red", "node_red_usual")):
                tuned = functools.partial(prepare, tuned_as)
                for lean in (False, True):
                    given = job | {"lean": lean}
                    peers[f"{name}-lean" if lean else name] = (tuned, given, options.readings, check_json)
                peers[f"{name}-usual"] = (functools.partial(prepare, usual_as), job, usual, check_json)
            results = [measure_one(name, *peer, broker, scratch) for name, peer in peers.items()
                       if name in (options.only or name).split(",")]
        finally:
            broker.close()
    report(results)
    sys.exit(any(row["wrong"] for row in results))


def report(results):
    print(f"{'':14} {'readings':>10} {'wall s':>8} {'CPU s':>8} {'per CPU s':>10} {'w/o start':>10} {'RSS MB':>7} "
          f"{'PSS MB':>7} {'B/reading':>9}")
    for row in results:
        without = row.get("readings_per_cpu_second_without_start", "")
        print(f"{row['peer']:14} {row['readings']:10} {row['seconds']:8.1f} {row['cpu_seconds']:8.2f} "
              f"{row['readings_per_cpu_second']:10} {without:10} {row['peak_rss_bytes'] / 1e6:7.1f} "
              f"{row['peak_pss_bytes'] / 1e6:7.1f} {row['bytes_per_reading']:9.1f}  "
              f"{'; '.join(row['wrong']) or 'right'}")
    print(json.dumps({"peers": results}))


if __name__ == "__main__":
    main()
