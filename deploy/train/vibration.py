"""Golden values of the vibration features, made by SciPy: edge-agent/src/vibration/golden.json.

    vibration.py            writes the file
    vibration.py --check    exit 1 unless the committed file is what SciPy says

A signal is a formula, so that the file stays small; edge-agent/src/vibration/tests.rs has the same one. Spectra are
scipy.signal.periodogram's, band edges scipy.signal.butter's. The velocity is computed a second time in the time domain
(digital filters, trapezoidal integration, no spectrum) and must agree.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy import integrate, signal, stats

GOLDEN = Path(__file__).parents[2] / "edge-agent/src/vibration/golden.json"
# Half a third of an octave (IEC 61260-1): the -3 dB points lie so far outside of the nominal band.
EDGE = 10**0.05
HIGH_HZ = 1000.0
# Trapezoids read low by (2 pi f / rate)^2 / 12, and digital filters warp near half the rate: 0.2 % were seen.
TIME_DOMAIN_REL = 0.005
REL = 1e-9

FAST, MEDIUM = 20000 / 3, 10000 / 3
CASES = [
    {
        "name": "1 m/s2 RMS at 159.155 Hz is 1 mm/s RMS",
        "rate_hz": FAST, "samples": 8192, "low_hz": 10.0, "bands": [[100.0, 200.0], [200.0, 1000.0]],
        "offset": 0.0, "tones": [[2**0.5, 500 / np.pi, 0.3]], "strikes": None, "noise": None,
    },
    {
        "name": "unbalance, misalignment and noise under gravity",
        "rate_hz": MEDIUM, "samples": 4096, "low_hz": 10.0, "bands": [[10.0, 100.0], [100.0, 1000.0], [0.0, 1666.0]],
        "offset": 9.80665, "tones": [[0.8, 29.6, 0.0], [0.35, 59.2, 1.0], [0.15, 88.8, 2.0]],
        "strikes": None, "noise": [1, 0.05],
    },
    {
        "name": "a bearing that is struck",
        "rate_hz": FAST, "samples": 8192, "low_hz": 10.0, "bands": [[10.0, 500.0], [500.0, 2000.0]],
        "offset": -0.2, "tones": [[0.8, 29.6, 0.0]], "strikes": [106.1173, 6.0, 1100.0, 0.002], "noise": [2, 0.1],
    },
    {
        "name": "a slow machine, burst of no power of two",
        "rate_hz": FAST, "samples": 40009, "low_hz": 2.0, "bands": [[1.0, 5.0]],
        "offset": 0.5, "tones": [[0.05, 2.5, 0.0], [0.02, 5.0, 0.5], [0.3, 48.0, 1.0]],
        "strikes": None, "noise": [3, 0.02],
    },
]


def uniform(seed, n):
    """Numbers in -1 .. 1 by Knuth's linear congruential generator."""
    x, out = seed, np.empty(n)
    for i in range(n):
        x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
        out[i] = (x >> 11) / 2**52 - 1
    return out


def acceleration(case, n):
    t = np.arange(n) / case["rate_hz"]
    a = np.full(n, case["offset"])
    for amplitude, hz, phase in case["tones"]:
        a += amplitude * np.sin(2 * np.pi * hz * t + phase)
    if case["strikes"]:
        hz, amplitude, ring_hz, decay_s = case["strikes"]
        since = t * hz % 1 / hz
        a += amplitude * np.exp(-since / decay_s) * np.sin(2 * np.pi * ring_hz * since)
    if case["noise"]:
        seed, amplitude = case["noise"]
        a += amplitude * uniform(seed, n)
    return a


def velocity_by_spectrum(a, rate_hz, low_hz):
    """RMS in mm/s, as the agent does it."""
    f, psd = signal.periodogram(a, rate_hz, window="hann", detrend="constant", scaling="density")
    f, psd, line_hz = f[1:], psd[1:], f[1]
    gain = np.ones_like(f)
    for hz, kind in ((low_hz / EDGE, "highpass"), (HIGH_HZ * EDGE, "lowpass")):
        b, coefficients = signal.butter(3, 2 * np.pi * hz, kind, analog=True)
        gain *= np.abs(signal.freqs(b, coefficients, 2 * np.pi * f)[1])
    return 1e3 * np.sqrt(np.sum(psd * (gain / (2 * np.pi * f)) ** 2) * line_hz)


def velocity_by_time(a, rate_hz, low_hz):
    """RMS in mm/s with neither a spectrum nor a window. The first half is left to the filters to settle."""
    a = a - a.mean()
    for hz, kind in ((low_hz / EDGE, "highpass"), (HIGH_HZ * EDGE, "lowpass")):
        a = signal.sosfilt(signal.butter(3, hz, kind, fs=rate_hz, output="sos"), a)
    v = integrate.cumulative_trapezoid(a, dx=1 / rate_hz, initial=0)
    return 1e3 * np.std(v[len(v) // 2:])


def golden(case):
    rate_hz, low_hz = case["rate_hz"], case["low_hz"]
    a = acceleration(case, case["samples"])
    x = a - a.mean()
    f, psd = signal.periodogram(a, rate_hz, window="hann", detrend="constant", scaling="density")
    long = acceleration(case, int(60 * rate_hz))
    halves = velocity_by_spectrum(long[len(long) // 2:], rate_hz, low_hz), velocity_by_time(long, rate_hz, low_hz)
    assert abs(halves[0] / halves[1] - 1) < TIME_DOMAIN_REL, f"{case['name']}: {halves} mm/s"
    print(f"{case['name']}: {halves[0]:.4f} mm/s by spectrum, {halves[1]:.4f} mm/s in the time domain (30 s)")
    return case | {
        "rms": np.std(a),
        "peak": np.abs(x).max(),
        "crest_factor": np.abs(x).max() / np.std(a),
        "kurtosis": stats.kurtosis(a, fisher=False, bias=True),
        "band_rms": [np.sqrt(psd[(f >= low) & (f < high)].sum() * f[1]) for low, high in case["bands"]],
        "velocity": velocity_by_spectrum(a, rate_hz, low_hz),
    }


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return abs(left - right) <= REL * abs(left)
    return left == right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file instead of writing it")
    args = parser.parse_args()
    text = json.dumps([golden(case) for case in CASES], indent=1) + "\n"
    if not args.check:
        GOLDEN.write_text(text)
        return 0
    agrees = same(json.loads(text), json.loads(GOLDEN.read_text()))
    print(f"{GOLDEN.name}: {'as SciPy says' if agrees else 'not what SciPy says; run vibration.py'}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
