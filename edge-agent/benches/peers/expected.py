"""What must come out of a job, computed another way: whole columns of the table, and the shipped network machine by
machine. And whether what was published is that.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import orjson
import pandas as pd
import pyarrow as pa

BAD = 2  # quality
STATISTICS = ("count", "min", "max", "mean", "stddev", "first", "last")


def golden(job):
    """Checks runtime and network, with one and many machines a call, against the bundle's vectors; returns how many."""
    golden = json.loads(Path(job["model"]).with_name("golden.json").read_text())
    vectors = golden["vectors"]
    fixed = {key: golden["calibration"][key] for key in ("location", "scale", "drift")}
    fixed["threshold"] = [golden["calibration"]["threshold"]]
    given = [fixed | {"features": vector["features"], "state": vector["state"]} for vector in vectors]
    many = {key: np.array([one[key] for one in given], np.float32) for key in given[0]}
    outputs = ["score", "contributions", "state_out"]
    session = _session(job["model"])
    batched = session.run(outputs, many)
    for at, vector in enumerate(vectors):
        single = session.run(outputs, {key: values[at:at + 1] for key, values in many.items()})
        for name, one, row in zip(outputs, single, batched):
            for got in (one.ravel(), row[at].ravel()):
                if np.abs(got - vector[name]).max() > golden["tolerance"]:
                    raise SystemExit(f"golden vector {vector['name']!r}: {name} is {got}, not {vector[name]}")
    return len(vectors)


def expect(job, readings):
    """What must come of the first `readings` readings of the job's table."""
    ids = [device["id"] for device in job["devices"]]
    table = pd.read_csv(job["rows"], nrows=readings // len(ids), parse_dates=[job["time"]], date_format="ISO8601")
    ts = table[job["time"]].to_numpy("datetime64[ms]").astype(np.int64)
    values = table[ids].to_numpy(float)
    of = lambda key, none: np.array([none if device[key] is None else device[key] for device in job["devices"]])
    bad = ~((values >= of("low", -np.inf)) & (values <= of("high", np.inf)))
    good = np.where(bad, np.nan, values)
    minutes = np.unique(ts // job["window_ms"])
    first = pd.DataFrame(good[ts // job["window_ms"] == minutes[0]], columns=ids)
    pick = lambda of: first.apply(lambda column: of(column.dropna()))
    return {
        "read": values.size,
        "bad": int(bad.sum()),
        "sent": values.size - _held(ts, good, of("deadband", np.nan), of("heartbeat_ms", 0)),
        "windows": len(minutes) * len(ids),
        "first_window": {
            "count": first.count(), "min": first.min(), "max": first.max(), "mean": first.mean(),
            "stddev": first.std(), "first": pick(lambda c: c.iloc[0]), "last": pick(lambda c: c.iloc[-1]),
        },
        **_scores(job, ts, good),
    }


def _held(ts, good, width, heartbeat):
    held = 0
    for column in np.flatnonzero(np.isfinite(width)):
        last, since, width_here, heartbeat_here = np.nan, 0, width[column], heartbeat[column]
        for at, value in zip(ts.tolist(), good[:, column].tolist()):
            if abs(value - last) <= width_here and at - since < heartbeat_here:
                held += 1
            else:
                last, since = value, at
    return held


def _scores(job, ts, good):
    """`scores` counts the second with which the table ends; `raised_before` is without it, as the agent has it."""
    span = job["span_s"]
    seconds = ts // 1000
    whole = np.arange(-(-ts[0] // 1000), seconds[-1] + 1)
    ends = (whole[span - 1:] + 1) * 1000
    session = _session(job["model"])
    scores, raised = [], []
    for machine in job["machines"]:
        inputs = pd.DataFrame(good[:, machine["inputs"]]).groupby(seconds)
        sums, counts = inputs.sum().reindex(whole, fill_value=0), inputs.count().reindex(whole, fill_value=0)
        means = (sums.rolling(span).sum() / counts.rolling(span).sum()).to_numpy()[span - 1:]
        row = lambda key: np.array([machine[key]], np.float32).reshape(1, -1)
        given = {key: row(key) for key in ("location", "scale", "drift", "threshold")}
        state = np.zeros((1, job["state"]), np.float32)
        made = []
        for end, features in zip(ends.tolist(), means.astype(np.float32)):
            if np.isfinite(features).all():
                score, state = session.run(["score", "state_out"], given | {"features": features[None], "state": state})
                made.append((end, float(score[0])))
        raised += [(machine["name"], end) for end in _raised(made, machine["threshold"], job["rules"])]
        scores.append([score for _, score in made])
    return {"scores": sum(map(len, scores)), "score_sum": sum(map(sum, scores)),
            "first_scores": [[made[at] for made in scores] for at in range(min(3, *map(len, scores)))],
            "raised": sorted(raised), "raised_before": sorted(event for event in raised if event[1] < ends[-1])}


def _raised(scores, threshold, rules):
    """When anomalies were raised, of (end, score)."""
    above = below = 0
    is_open = False
    for end, score in scores:
        above = above + 1 if score > threshold else 0
        below = below + 1 if score < rules["clear_threshold"] else 0
        if not is_open and above >= rules["raise_after"]:
            is_open = True
            yield end
        elif is_open and below >= rules["clear_after"]:
            is_open, above, below = False, 0, 0


def _session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options)


def check_json(expected, messages):
    """What is wrong with what a peer published, a line each."""
    streams = {"readings": [], "aggregates": [], "anomalies": [], "done": []}
    for message in messages:
        stream = message.topic.rpartition("/")[2]
        streams[stream].append(orjson.loads(message.payload))
    if len(streams["done"]) != 1:
        return ["it has not said that it is done"]
    [done] = streams["done"]
    sent = [_readings(batch) for batch in streams["readings"]]
    windows = [row for batch in streams["aggregates"] for row in batch["devices"]]
    wrong = _differ(expected, {
        "read": done["read"],
        "bad": sum(bad for _, bad in sent),
        "sent": sum(readings for readings, _ in sent),
        "windows": len(windows),
        "scores": done["scores"],
        "raised": sorted((event["machine"], event["started_at"])
                         for event in streams["anomalies"] if "ended_at" not in event),
    })
    if not np.allclose(done["first_scores"], expected["first_scores"], atol=1e-4):
        wrong.append("first scores differ")
    if not np.isclose(done["score_sum"], expected["score_sum"], rtol=1e-5):
        wrong.append(f"sum of scores {done['score_sum']}, expected {expected['score_sum']}")
    first = windows[:len(streams["aggregates"][0]["devices"])]
    return wrong + _first_window(expected, pd.DataFrame(first).set_index("device_id"))


def check_arrow(expected, messages):
    """What is wrong with what the agent published, a line each."""
    tables = {"readings": [], "aggregates": [], "anomalies": []}
    for message in messages:
        stream = message.topic.rpartition("/")[2]
        if stream in tables:
            tables[stream].append(pa.ipc.open_stream(message.payload).read_all())
    rows = {stream: sum(map(len, parts)) for stream, parts in tables.items()}
    # A row when it is raised and one when it ends.
    events = {(event["asset_id"], int(event["started_at"].timestamp() * 1000))
              for table in tables["anomalies"] for event in table.select(["asset_id", "started_at"]).to_pylist()}
    got = {"sent": rows["readings"], "windows": rows["aggregates"], "raised_before": sorted(events)}
    wrong = _differ(expected, got)
    if tables["aggregates"]:
        windows = pd.concat([table.to_pandas() for table in tables["aggregates"]])
        first = windows[windows["window_start"] == windows["window_start"].min()].astype({"device_id": str})
        wrong += _first_window(expected, first.set_index("device_id"))
    return wrong


def _readings(batch):
    """Readings in a batch of either form, and how many of them are bad."""
    if "values" in batch[0]:
        return sum(len(row["values"]) for row in batch), sum(len(row.get("bad", ())) for row in batch)
    return len(batch), sum(reading.get("quality") == BAD for reading in batch)


def _differ(expected, got):
    return [f"{key} {str(value)[:80]}, expected {str(expected[key])[:80]}"
            for key, value in got.items() if value != expected[key]]


def _first_window(expected, got):
    wrong = []
    for key in STATISTICS:
        want = expected["first_window"][key].dropna()
        if not np.allclose(got[key].reindex(want.index).astype(float), want.astype(float), rtol=1e-9, atol=1e-9):
            wrong.append(f"{key} of the first window differs")
    return wrong
