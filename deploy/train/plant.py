"""The demo plant of firmware-sim/data/plant.toml, as its README.md defines it, in numpy.

Gives what the edge sees: the window means of the continuous channels after noise, the 4-20 mA loop and the
converter. The Rust plant draws its noise from another generator: the two agree in distribution, not in bits.
"""

import tomllib
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "firmware-sim" / "data"
WINDOW_S = 60


def read_rows(path):
    """A recorded run: column name to values."""
    with open(DATA / path) as f:
        names = f.readline().strip().split(",")
        values = np.loadtxt(f, delimiter=",")
    return dict(zip(names, values.T))


class Plant:
    def __init__(self):
        with open(DATA / "plant.toml", "rb") as f:
            self.spec = tomllib.load(f)
        self.loop = self.spec["loop"]
        self.segments = self.loop["segment"]
        self.runs = {s["file"]: read_rows(s["file"]) for s in self.segments}
        # Analysers speak once in 6 or 15 min: they are recorded, not scored.
        self.inputs = [c for c in self.spec["channel"] if "hold_rows" not in c]
        row_s = self.loop["row_s"]
        self.cycle_s = [(s["end_row"] - s["first_row"]) * row_s for s in self.segments]
        self.period_s = sum(self.cycle_s)

    def devices(self):
        return [c["device"] for c in self.inputs]

    def recorded(self, run, row):
        """All inputs of a run at fractional rows, interpolated linearly: [len(row), inputs]."""
        at = np.arange(len(next(iter(run.values()))))
        return np.stack([np.interp(row, at, run[c["column"]]) * c["scale"] for c in self.inputs], axis=1)

    def looped(self, phase):
        """All inputs at phases of the loop in seconds, before noise."""
        row_s, fade_s = self.loop["row_s"], self.loop["crossfade_s"]
        phase = np.mod(phase, self.period_s)
        out = np.empty((len(phase), len(self.inputs)))
        start = 0
        for i, segment in enumerate(self.segments):
            here = (phase >= start) & (phase < start + self.cycle_s[i])
            offset = phase[here] - start
            before = self.segments[i - 1]
            new = self.recorded(self.runs[segment["file"]], segment["first_row"] + offset / row_s)
            old = self.recorded(self.runs[before["file"]], before["end_row"] + np.minimum(offset, fade_s) / row_s)
            weight = np.clip(offset / fade_s, 0.0, 1.0)[:, None]
            out[here] = weight * new + (1.0 - weight) * old
            start += self.cycle_s[i]
        return out

    def onsets(self):
        """(fault, phase at which it begins, phase at which the recovery begins), in seconds."""
        start, out = 0, []
        for segment, length in zip(self.segments, self.cycle_s):
            onset = start + (segment["onset_row"] - segment["first_row"]) * self.loop["row_s"]
            out.append((segment["fault"], onset, start + length))
            start += length
        return out

    def windows(self, values, rng):
        """Window means of what the edge reads, for true values sampled at the polling period."""
        column = lambda key: np.array([c[key] for c in self.inputs])
        low, span = column("at_4ma"), column("at_20ma") - column("at_4ma")
        adc = self.spec["adc"]
        seen = values + rng.normal(size=values.shape) * column("sigma")
        ma = np.clip(4.0 + 16.0 * (seen - low) / span, adc["saturate_low_ma"], adc["saturate_high_ma"])
        step_ma = adc["full_scale_v"] / 32768.0 / adc["shunt_ohm"] * 1000.0
        read = low + (np.rint(ma / step_ma) * step_ma - 4.0) / 16.0 * span
        per = WINDOW_S // self.poll_s()
        return read[: len(read) // per * per].reshape(-1, per, read.shape[1]).mean(axis=1)

    def poll_s(self):
        (period,) = {c["period_s"] for c in self.inputs}
        return period

    def run_windows(self, path, rng):
        """Window means over a whole recorded run."""
        run = read_rows(path)
        seconds = (len(next(iter(run.values()))) - 1) * self.loop["row_s"]
        return self.windows(self.recorded(run, np.arange(0, seconds, self.poll_s()) / self.loop["row_s"]), rng)

    def loop_windows(self, start_s, seconds, rng):
        """Window means over a stretch of the loop."""
        return self.windows(self.looped(start_s + np.arange(0, seconds, self.poll_s())), rng)
