"""The edge agent's job as such a script is usually written: pandas for every step, a second of rows at a time.

    python python_usual.py JOB.json              (run.py writes the job, and says what is in it)

Nothing in it is slow on purpose: whole columns wherever pandas has a call for it, and no more than the job. A call of
the network a machine, as the network is shipped; readings by to_dict and json. What pandas does not come into, it
takes from python_peer.py: the connection, and when an anomaly is raised and cleared.
"""

import json
import sys
from collections import deque

import numpy as np
import pandas as pd

import python_peer
from python_peer import BAD, Uplink

STATISTICS = ["count", "min", "max", "mean", "std", "first", "last"]


class Deadband:
    """Which readings to send: a bad one always, and so the one after it."""

    def __init__(self, devices):
        self.width = devices["deadband"].astype(float)
        self.heartbeat = pd.to_timedelta(devices["heartbeat_ms"].astype(float).fillna(0), unit="ms")
        self.last = pd.Series(np.nan, devices.index)
        self.at = pd.Series(pd.Timestamp(0, tz="UTC"), devices.index)

    def sends(self, good):
        sends = pd.DataFrame(True, good.index, good.columns)
        if self.width.isna().all():
            return sends
        # What was sent last decides, so row by row.
        for ts, row in good.iterrows():
            held = ((row - self.last).abs() <= self.width) & (ts - self.at < self.heartbeat)
            sends.loc[ts] = ~held
            self.last = self.last.where(held, row)
            self.at = self.at.where(held, ts)
        return sends


class Windows:
    """Statistics of every device a minute."""

    def __init__(self, uplink, width_ms):
        self.uplink, self.width = uplink, pd.Timedelta(width_ms, unit="ms")
        self.start, self.rows, self.count = None, [], 0

    def push(self, second, good):
        start = second.floor(self.width)
        if start != self.start:
            self.close()
            self.start = start
        self.rows.append(good)

    def close(self):
        rows = pd.concat(self.rows) if self.rows else pd.DataFrame()
        self.rows = []
        if rows.empty:
            return
        stats = rows.melt(var_name="device_id").groupby("device_id", sort=False)["value"].agg(STATISTICS)
        # JSON has no NaN.
        devices = stats.rename(columns={"std": "stddev"}).reset_index().replace({np.nan: None}).to_dict("records")
        width_ms = self.width // pd.Timedelta(milliseconds=1)
        self.uplink.publish("aggregates", {"start": epoch_ms(self.start), "width_ms": width_ms, "devices": devices})
        self.count += len(devices)


class Scores(python_peer.Scores):
    """Scores machine by machine every second, of the means of the last `span` seconds."""

    def __init__(self, uplink, job):
        super().__init__(uplink, job)
        self.recent = deque(maxlen=self.span)

    def push(self, second, good):
        self.recent.append(good)
        if len(self.recent) < self.span:
            return
        self.second = epoch_ms(second) // 1000
        means = pd.concat(self.recent).mean()
        scored = []
        for number, machine in enumerate(self.machines):
            features = means.iloc[machine["inputs"]]
            if features.notna().all():
                scored.append(self.score(number, machine, features))
        if scored and len(self.first) < 3:
            self.first.append(scored)

    def score(self, number, machine, features):
        given = {key: np.array([machine[key]], np.float32) for key in ("location", "scale", "drift")}
        given["threshold"] = np.array([[machine["threshold"]]], np.float32)
        given["features"] = features.to_numpy(np.float32)[None]
        given["state"] = self.state[[number]]
        scores, weights, self.state[[number]] = self.session.run(["score", "contributions", "state_out"], given)
        score = float(scores[0])
        self.count += 1
        self.total += score
        self.above[number] = self.above[number] + 1 if score > machine["threshold"] else 0
        self.below[number] = self.below[number] + 1 if score < self.rules["clear_threshold"] else 0
        self.judge([number], [score], [int(weights.argmax())])
        return score


def to_records(rows, bad, sends):
    """An object for each reading of the second that is sent."""
    rows = rows.set_axis(rows.index.strftime("%Y-%m-%dT%H:%M:%S.%f").str[:-3] + "Z")
    readings = rows.rename_axis(index="timestamp", columns="device_id").stack().rename("value").reset_index()
    chosen = sends.to_numpy().ravel()
    records = readings[chosen].to_dict("records")
    for place in np.flatnonzero(bad.to_numpy().ravel()[chosen]):
        records[place]["quality"] = BAD
        if pd.isna(records[place]["value"]):
            records[place]["value"] = None
    return records


def epoch_ms(ts):
    return int(ts.timestamp() * 1000)


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    devices = pd.DataFrame(job["devices"]).set_index("id")
    low, high = devices["low"].astype(float).fillna(-np.inf), devices["high"].astype(float).fillna(np.inf)
    uplink = Uplink(job["port"], job["topic"], dumps=lambda payload: json.dumps(payload).encode())
    deadband, windows, scores = Deadband(devices), Windows(uplink, job["window_ms"]), Scores(uplink, job)
    read = sent = marked = 0
    table = pd.read_csv(job["rows"], parse_dates=[job["time"]], date_format="ISO8601", index_col=job["time"])
    table = table[devices.index].astype(float)
    for second, rows in table.resample("1s"):
        bad = rows.lt(low) | rows.gt(high) | rows.isna()
        good = rows.mask(bad)
        windows.push(second, good)
        if second >= table.index[0]:  # A second that the table begins within is not whole.
            scores.push(second, good)
        records = to_records(rows, bad, deadband.sends(good))
        if records:
            uplink.publish("readings", records)
        read += rows.size
        sent += len(records)
        marked += int(bad.sum().sum())
    windows.close()
    uplink.publish("done", {
        "read": read, "sent": sent, "bad": marked, "windows": windows.count, "scores": scores.count,
        "score_sum": scores.total, "first_scores": scores.first, "raised": scores.raised, "open": len(scores.open),
    })
    uplink.close()


if __name__ == "__main__":
    main()
