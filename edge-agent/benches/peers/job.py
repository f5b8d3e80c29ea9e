"""What is to be done: the agent's own configuration, bundle and table, in the form that the peers read.

A job is JSON:

| key | what |
|---|---|
| `rows`, `time` | the table, and the name of its column of times |
| `devices` | in the order of the columns: `id`, `low`, `high`, `deadband`, `heartbeat_ms`; null for none |
| `window_ms` | width of the tumbling windows |
| `model` | the network, which takes a row a machine |
| `state` | length of the state that it carries |
| `span_s` | every second a score, of the means of the last so many seconds |
| `machines` | `name`, `inputs` (numbers of devices), `location`, `scale`, `drift`, `threshold` |
| `rules` | `raise_after`, `clear_after`, `clear_threshold`, `severity` |
| `port`, `topic` | of the broker on 127.0.0.1, and the root of what is published |
| `lean` | the form of the readings |

Readings are published in either of two forms of JSON, both common: an object a reading, which is what cloud-ingest
takes from other people's devices (stream `json`), so that the readings end where the agent's do,

    [{"device_id": "m00/flow", "timestamp": "2026-01-01T00:00:00.100Z", "value": 122.5, "quality": 2}, ...]

with the quality only where it is bad; or, lean, an object a row, as small and as quick as JSON gets, which somebody
would have to take apart in the cloud:

    [{"ts": 1767225600100, "values": {"m00/flow": 122.5, ...}, "bad": ["m00/flow"]}, ...]

The shipped network takes any number of machines a call. The tuned peers score all machines in one, as the agent does;
`expected.py` compares that with a machine a call.
"""

import fnmatch
import re
import tomllib
from pathlib import Path

UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def milliseconds(duration):
    number, unit = re.fullmatch(r"([\d.]+)\s*(\w+)", duration).groups()
    return int(float(number) * UNITS_MS[unit])


def load(folder):
    """The job of a folder that `firmware-sim bench edge --data-dir` has left, without what a run adds."""
    config = tomllib.loads((folder / "edge-agent.toml").read_text())
    [replay] = config["replay"]
    bundle = (folder / config["models"]["dir"] / "level-shift").resolve()
    declared = {device["id"]: device for device in config["device"]}
    devices = [_device(declared[device], config.get("filter", [])) for device in replay["columns"].values()]
    if any(column != device for column, device in replay["columns"].items()):
        raise SystemExit(f"{folder}/edge-agent.toml: a column must have the name of its device for the peers")
    model = tomllib.loads((bundle / "model.toml").read_text())
    if (model["hop"], model["features"]) != ("1s", ["mean"]):
        raise SystemExit(f"{bundle}/model.toml: the peers score means, once a second")
    ids = [device["id"] for device in devices]
    calibration = tomllib.loads((bundle / "calibration.toml").read_text())
    return {
        "rows": str(folder / Path(replay["file"]).name),
        "time": replay["time"],
        "devices": devices,
        "window_ms": milliseconds(config.get("window", {}).get("width", "60s")),
        "model": str(bundle / "model.onnx"),
        "state": model["state"],
        "span_s": milliseconds(model["span"]) // 1000,
        "machines": [_machine(machine, model, ids) for machine in calibration["machine"]],
        "rules": {key: model[key] for key in ("raise_after", "clear_after", "clear_threshold", "severity")},
    }


def _device(device, filters):
    keys = ("deadband", "heartbeat", "stuck_after", "rate_limit")
    said = [device] + [table for table in filters if fnmatch.fnmatchcase(device["id"], table["devices"])]
    found = {key: next((table[key] for table in said if key in table), None) for key in keys}
    if found["stuck_after"] or found["rate_limit"]:
        raise SystemExit(f"device {device['id']}: the peers know neither stuck_after nor rate_limit; take them out")
    low, high = device.get("range", (None, None))
    heartbeat = found["heartbeat"] and milliseconds(found["heartbeat"])
    return {"id": device["id"], "low": low, "high": high, "deadband": found["deadband"], "heartbeat_ms": heartbeat}


def _machine(machine, model, ids):
    return {
        "name": machine["name"],
        "inputs": [ids.index(pattern.replace("*", machine["name"])) for pattern in model["inputs"]],
        "threshold": machine["threshold"],
        **{key: [fitted[key] for fitted in machine["input"]] for key in ("location", "scale", "drift")},
    }


def cut(rows, readings, devices, out):
    """Writes the first rows of a table, `readings` of them or all, to `out`; returns how many readings they hold."""
    with open(rows, "rb") as table, open(out, "wb") as part:
        part.write(table.readline())
        count = 0
        for count, line in enumerate(table, 1):
            part.write(line)
            if count * devices >= readings:
                break
    return count * devices
