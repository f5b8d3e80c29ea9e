"""The edge agent's job as a Python script: pandas reads and aggregates, onnxruntime scores, paho-mqtt publishes.

    python python_peer.py JOB.json              (run.py writes the job, and says what is in it)

Written to be as fast as such a script honestly gets:

- pandas reads the table, a minute of rows at a time, and computes the windows. What lies between goes by the second, in
  bare numpy: as prompt as the agent, and 15 times as fast as pandas would be, of which a call on 200 columns costs
  milliseconds, however short they are.
- The deadband compares with what was sent last, so it cannot be done on whole columns: it goes row by row, in numpy
  over all devices at once.
- All machines are scored by one call of the network a second.
- JSON by orjson, in the form that the job says (job.py).

It does no more than the job: no late or doubled rows, no durable queue, no account of what it did but the totals
that it publishes last.
"""

import itertools
import json
import sys
from collections import deque

import numpy as np
import onnxruntime
import orjson
import pandas as pd
from paho.mqtt.client import Client, CallbackAPIVersion

CHUNK_ROWS = 600  # rows that pandas reads at a time: a minute
STEP_ROWS = 10  # that are worked on at a time: a second
BAD = 2  # quality
IN_FLIGHT = 64  # messages published and not yet acknowledged


class Uplink:
    """QoS 1 with a bound on what is under way."""

    def __init__(self, port, root, dumps=orjson.dumps):
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.max_inflight_messages_set(IN_FLIGHT)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.root, self.dumps, self.sent = root, dumps, deque()

    def publish(self, stream, payload):
        self.sent.append(self.client.publish(f"{self.root}/{stream}", self.dumps(payload), qos=1))
        while len(self.sent) > IN_FLIGHT:
            self.sent.popleft().wait_for_publish()

    def close(self):
        for message in self.sent:
            message.wait_for_publish()
        self.client.disconnect()
        self.client.loop_stop()


class Deadband:
    """Which readings to send: NaN stands for a bad one, which is sent, as is the one after it."""

    def __init__(self, devices):
        self.width = np.array([device["deadband"] for device in devices], float)  # NaN where there is none
        self.heartbeat = np.array([device["heartbeat_ms"] or 0 for device in devices])
        self.last = np.full(len(devices), np.nan)
        self.at = np.zeros(len(devices), np.int64)
        self.used = np.isfinite(self.width).any()

    def sends(self, ts, values):
        sends = np.ones(values.shape, bool)
        if self.used:
            for at, row, send in zip(ts, values, sends):
                np.greater(np.abs(row - self.last), self.width, out=send)
                send |= np.isnan(self.last - row + self.width) | (at - self.at >= self.heartbeat)
                np.copyto(self.last, row, where=send)
                self.at[send] = at
        return sends


class Windows:
    """Statistics of every device a minute. Rows are kept until their minute is over."""

    def __init__(self, uplink, names, width_ms):
        self.uplink, self.names, self.width_ms = uplink, names, width_ms
        self.start, self.rows, self.count = None, [], 0

    def push(self, ts, good):
        starts = ts - ts % self.width_ms
        cuts = (np.flatnonzero(np.diff(starts)) + 1).tolist()
        for begin, end in itertools.pairwise([0, *cuts, len(ts)]):
            if self.start != starts[begin]:
                self.close()
                self.start = int(starts[begin])
            self.rows.append(good[begin:end])

    def close(self):
        if not self.rows:
            return
        # One block of one type: pandas then computes all columns at once.
        good = pd.DataFrame(np.concatenate(self.rows), columns=self.names)
        self.rows = []
        stats = pd.DataFrame({
            "count": good.count(), "min": good.min(), "max": good.max(), "mean": good.mean(), "stddev": good.std(),
            "first": good.bfill().iloc[0], "last": good.ffill().iloc[-1],
        })
        rows = stats.rename_axis("device_id").reset_index().to_dict("records")
        self.uplink.publish("aggregates", {"start": self.start, "width_ms": self.width_ms, "devices": rows})
        self.count += len(rows)


class Scores:
    """Scores every machine every second, of the means of the last `span` seconds, and raises anomalies."""

    def __init__(self, uplink, job):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(job["model"], options)
        self.uplink, self.rules, self.machines, self.span = uplink, job["rules"], job["machines"], job["span_s"]
        self.columns = np.array([machine["inputs"] for machine in self.machines])
        of = lambda key: np.array([machine[key] for machine in self.machines], np.float32)
        self.given = {key: of(key) for key in ("location", "scale", "drift")} | {"threshold": of("threshold")[:, None]}
        self.threshold = np.array([machine["threshold"] for machine in self.machines])
        self.state = np.zeros((len(self.machines), job["state"]), np.float32)
        self.sums = np.zeros((self.span, *self.columns.shape))
        self.counts = np.zeros(self.sums.shape, np.int64)
        self.begun = self.second = None
        self.above, self.below = np.zeros((2, len(self.machines)), np.int64)
        self.open = {}
        self.count, self.total, self.first, self.raised = 0, 0.0, [], 0

    def push(self, ts, values):
        if self.begun is None:
            self.begun = -(-int(ts[0]) // 1000)
            self.second = int(ts[0]) // 1000
        seconds = ts // 1000
        cuts = np.flatnonzero(np.diff(seconds, prepend=seconds[0] - 1))
        inputs = values[:, self.columns]
        sums = np.add.reduceat(np.nan_to_num(inputs), cuts)
        counts = np.add.reduceat(np.isfinite(inputs), cuts, dtype=np.int64)
        for second, added, count in zip(seconds[cuts].tolist(), sums, counts):
            while self.second < second:
                self.close()
            self.sums[second % self.span] += added
            self.counts[second % self.span] += count

    def close(self):
        """Scores the window that ends with the second under way, and goes on to the next."""
        if self.second - self.span + 1 >= self.begun:
            counts = self.counts.sum(axis=0)
            whole = counts.all(axis=1)
            if whole.all():
                whole = slice(None)
            if counts.any():
                self.score(whole, (self.sums.sum(axis=0)[whole] / counts[whole]).astype(np.float32))
        self.second += 1
        self.sums[self.second % self.span] = 0
        self.counts[self.second % self.span] = 0

    def score(self, which, features):
        given = {key: values[which] for key, values in self.given.items()}
        scores, weights, self.state[which] = self.session.run(
            ["score", "contributions", "state_out"], given | {"features": features, "state": self.state[which]})
        self.count += len(scores)
        self.total += float(scores.sum())
        if len(self.first) < 3:
            self.first.append(scores.tolist())
        over, under = scores > self.threshold[which], scores < self.rules["clear_threshold"]
        self.above[which] = np.where(over, self.above[which] + 1, 0)
        self.below[which] = np.where(under, self.below[which] + 1, 0)
        if self.open or over.any():
            of = np.arange(len(self.machines))[which].tolist()
            self.judge(of, scores.tolist(), weights.argmax(axis=1).tolist())

    def judge(self, machines, scores, places):
        end = (self.second + 1) * 1000
        for machine, score, place in zip(machines, scores, places):
            event = self.open.get(machine)
            if event is None and self.above[machine] >= self.rules["raise_after"]:
                self.raised += 1
                who = self.machines[machine]
                event = {"machine": who["name"], "started_at": end, "score": 0.0, "threshold": who["threshold"]}
                self.open[machine] = event
                self.say(event, score, place)
                self.uplink.publish("anomalies", event)
            elif event is not None:
                self.say(event, score, place)
                if self.below[machine] >= self.rules["clear_after"]:
                    self.uplink.publish("anomalies", self.open.pop(machine) | {"ended_at": end})
                    self.above[machine] = self.below[machine] = 0

    def say(self, event, score, place):
        if score > event["score"]:
            severity = [s["name"] for s in self.rules["severity"] if score >= s["score"]][-1]
            event |= {"score": score, "input": place, "severity": severity}


class Readings:
    """Publishes what the deadband lets through, a second a message."""

    def __init__(self, uplink, devices, lean):
        self.uplink, self.lean = uplink, lean
        self.names = [device["id"] for device in devices]
        self.deadband = Deadband(devices)
        self.sent = 0

    def push(self, ts, values, bad, good):
        sends = self.deadband.sends(ts, good)
        self.sent += int(sends.sum())
        stamps = ts.tolist() if self.lean else np.datetime_as_string(ts.astype("M8[ms]"), timezone="UTC").tolist()
        partly, judged, seconds = ~sends.all(axis=1), bad.any(axis=1), (ts // 1000).tolist()
        if judged.any():
            values = np.where(np.isfinite(values), values, None)  # JSON has no NaN
        batch = []
        for i, (stamp, row) in enumerate(zip(stamps, values.tolist())):
            if batch and seconds[i] != seconds[i - 1]:
                self.uplink.publish("readings", batch)
                batch = []
            names, marked = self.names, {self.names[column] for column in np.flatnonzero(bad[i])} if judged[i] else ()
            if partly[i]:
                chosen = sends[i].tolist()
                names, row = itertools.compress(names, chosen), itertools.compress(row, chosen)
            if self.lean:
                batch.append({"ts": stamp, "values": dict(zip(names, row))})
                if marked:
                    batch[-1]["bad"] = list(marked)
                continue
            readings = [{"device_id": name, "timestamp": stamp, "value": value} for name, value in zip(names, row)]
            if marked:
                for reading in readings:
                    if reading["device_id"] in marked:
                        reading["quality"] = BAD
            batch += readings
        if batch:
            self.uplink.publish("readings", batch)


def main():
    with open(sys.argv[1]) as file:
        job = json.load(file)
    devices = job["devices"]
    names = [device["id"] for device in devices]
    limit = lambda key, none: np.array([none if device[key] is None else device[key] for device in devices])
    low, high = limit("low", -np.inf), limit("high", np.inf)
    uplink = Uplink(job["port"], job["topic"])
    windows, scores = Windows(uplink, names, job["window_ms"]), Scores(uplink, job)
    readings = Readings(uplink, devices, job["lean"])
    read = marked = 0
    table = pd.read_csv(job["rows"], usecols=[job["time"], *names], parse_dates=[job["time"]], date_format="ISO8601",
                        dtype=dict.fromkeys(names, float), chunksize=CHUNK_ROWS)
    for chunk in table:
        all_ts = chunk.pop(job["time"]).to_numpy("datetime64[ms]").astype(np.int64)
        all_values = chunk[names].to_numpy()
        for begin in range(0, len(all_ts), STEP_ROWS):
            ts, values = all_ts[begin:begin + STEP_ROWS], all_values[begin:begin + STEP_ROWS]
            bad = ~((values >= low) & (values <= high))  # NaN is bad, too
            good = np.where(bad, np.nan, values)
            windows.push(ts, good)
            scores.push(ts, good)
            readings.push(ts, values, bad, good)
            read += values.size
            marked += int(bad.sum())
    scores.close()
    windows.close()
    uplink.publish("done", {
        "read": read, "sent": readings.sent, "bad": marked, "windows": windows.count, "scores": scores.count,
        "score_sum": scores.total, "first_scores": scores.first, "raised": scores.raised, "open": len(scores.open),
    })
    uplink.close()


if __name__ == "__main__":
    main()
