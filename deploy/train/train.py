"""Fits the model bundle firmware-sim/data/models/tep-process and measures it on the demo plant's loop.

    python deploy/train/train.py            writes the bundle and prints the evaluation
    python deploy/train/train.py --check    fails unless the committed bundle equals a fresh fit

The score is Hotelling's T2 of the window means against normal operation, with a ridge on the correlation matrix
so that directions without variance do not rule, as a ratio to its limit: score = sqrt(T2 / limit). 1.0 is the
threshold. Each input's share in a score is its reconstruction-based contribution (Alcala and Qin, Automatica 45,
2009). Only normal runs are used to fit; the faults and the normal rows of the loop are held out.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from plant import DATA, WINDOW_S, Plant

BUNDLE = DATA / "models" / "tep-process"
NORMAL_RUNS = ["tep/d00.csv", "tep/d00_te.csv"]
FIT_SEEDS = range(1, 5)  # each normal run is read four times, with other sensor noise
TEST_SEEDS = range(101, 111)
RIDGE = 0.1
RAISE_AFTER = 5
CLEAR_AFTER = 15
CLEAR_THRESHOLD = 0.9
CRITICAL = 3.0
TOLERANCE = 1e-4


def rounded(values):
    """Six significant digits, so that another CPU's linear algebra gives the same bytes."""
    return np.vectorize(lambda v: float(f"{v:.5e}"))(values).astype(np.float32)


def fit(runs):
    """(mean, standard deviation, precision matrix, limit of T2) of normal runs of window means."""
    values = np.vstack(runs)
    mean, std = rounded(values.mean(axis=0)), rounded(values.std(axis=0))
    correlation = np.cov(((values - mean) / std).T)
    n = len(mean)
    precision = rounded(np.linalg.inv((correlation + RIDGE * np.eye(n)) / (1.0 + RIDGE)))
    # The limit is the highest T2 that any RAISE_AFTER windows in a row kept up in normal operation.
    limit = max(held(t2(run, mean, std, precision), RAISE_AFTER).max() for run in runs)
    return mean, std, precision, rounded(limit)


def t2(windows, mean, std, precision):
    z = (windows - mean) / std
    return (z @ precision * z).sum(axis=1)


def held(values, windows):
    """The level kept up over the last `windows` values."""
    return np.lib.stride_tricks.sliding_window_view(values, windows).min(axis=1)


def build(mean, std, precision, limit):
    """The ONNX graph: features [1, N] -> score [1], contributions [1, N]."""
    n = len(mean)
    constant = lambda name, value: numpy_helper.from_array(np.asarray(value), name)
    nodes = [
        helper.make_node("Sub", ["features", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["z"]),
        helper.make_node("MatMul", ["z", "precision"], ["pz"]),
        helper.make_node("Mul", ["z", "pz"], ["terms"]),
        helper.make_node("ReduceSum", ["terms", "last_axis"], ["t2"], keepdims=0),
        helper.make_node("Div", ["t2", "limit"], ["ratio"]),
        helper.make_node("Sqrt", ["ratio"], ["score"]),
        # Reconstruction-based contributions, as shares of their sum.
        helper.make_node("Mul", ["pz", "pz"], ["pz_squared"]),
        helper.make_node("Div", ["pz_squared", "diagonal"], ["raw"]),
        helper.make_node("ReduceSum", ["raw", "last_axis"], ["raw_sum"], keepdims=1),
        helper.make_node("Add", ["raw_sum", "tiny"], ["raw_total"]),
        helper.make_node("Div", ["raw", "raw_total"], ["contributions"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tep-process",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, n])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("contributions", TensorProto.FLOAT, [1, n]),
        ],
        [
            constant("mean", mean.reshape(1, n)),
            constant("std", std.reshape(1, n)),
            constant("precision", precision),
            constant("diagonal", np.diag(precision).reshape(1, n).copy()),
            constant("limit", limit.reshape(1)),
            constant("tiny", np.array([[1e-12]], np.float32)),
            constant("last_axis", np.array([1], np.int64)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="tailrace")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def scorer(model):
    """Runs the ONNX graph window by window, as the edge does: (scores, contributions)."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def score(windows):
        out = [session.run(None, {"features": w[None, :].astype(np.float32)}) for w in windows]
        return np.array([s[0] for s, _ in out]), np.vstack([c for _, c in out])

    return score


def episodes(scores):
    """[first, last] window indices at which an event is raised and cleared; None while it is open."""
    out, above, below = [], 0, 0
    is_open = False
    for i, score in enumerate(scores):
        above = above + 1 if score > 1.0 else 0
        below = below + 1 if score < CLEAR_THRESHOLD else 0
        if not is_open and above >= RAISE_AFTER:
            out.append([i, None])
            is_open = True
        elif is_open and below >= CLEAR_AFTER:
            out[-1][1] = i
            is_open = False
    return out


def evaluate(plant, score):
    """One day of the loop per seed and start: delays by fault in minutes, and events that no fault explains."""
    raised = {fault: [] for fault, _, _ in plant.onsets()}
    cleared = {fault: [] for fault in raised}
    first_device = {fault: [] for fault in raised}
    stray, calm = 0, []
    day = plant.period_s
    for seed in TEST_SEEDS:
        rng = np.random.default_rng(seed)
        # Windows fall anywhere against the recorded rows; half a day more, so that the last event can end.
        start = plant.loop["start_s"] + 5 * int(rng.integers(0, 36))
        windows = plant.loop_windows(start, day + day // 2, rng)
        scores, shares = score(windows)
        closes = lambda i: start + (i + 1) * WINDOW_S  # phase at which window i is complete
        found = episodes(scores)
        for fault, onset, end in plant.onsets():
            hit = [e for e in found if onset < closes(e[0]) <= end]
            raised[fault].append((closes(hit[0][0]) - onset) / 60 if hit else np.inf)
            cleared[fault].append((closes(hit[0][1]) - end) / 60 if hit and hit[0][1] is not None else np.inf)
            first_device[fault].append(plant.devices()[shares[hit[0][0]].argmax()] if hit else "none")
            stray += max(len(hit) - 1, 0)
            # The normal stretch before this fault, once the recovery before it is an hour past its fade.
            before = [scores[i] for i in range(len(scores)) if onset - 4.5 * 3600 <= closes(i) <= onset]
            calm.append(held(np.array(before), RAISE_AFTER).max())
        in_fault = lambda t: any(onset < t % day <= end for _, onset, end in plant.onsets())
        stray += sum(not in_fault(closes(e[0])) for e in found)
    return raised, cleared, first_device, stray, max(calm)


def report(plant, score, runs):
    raised, cleared, first_device, stray, calm = evaluate(plant, score)
    print(f"{len(TEST_SEEDS)} days of the loop, each with other sensor noise; minutes of recorded time, min ... max\n")
    print("| fault | event raised after onset | cleared after the recovery begins | device that weighs most |")
    print("|---|---|---|---|")
    for fault in raised:
        names = sorted(set(first_device[fault]), key=lambda d: (-first_device[fault].count(d), d))
        r, c = raised[fault], cleared[fault]
        print(f"| {fault} | {min(r):.0f} ... {max(r):.0f} | {min(c):.0f} ... {max(c):.0f} | {', '.join(names)} |")
    print(f"\nevents that no fault explains: {stray}")
    print(f"highest score kept up for {RAISE_AFTER} windows in the held-out normal stretches: {calm:.2f}")
    for fitted, judged in ((0, 1), (1, 0)):
        parts = fit(runs[fitted :: len(NORMAL_RUNS)])
        others = runs[judged :: len(NORMAL_RUNS)]
        worst = max(np.sqrt(held(t2(run, *parts[:3]), RAISE_AFTER) / parts[3]).max() for run in others)
        print(f"fitted on {NORMAL_RUNS[fitted]} alone, highest on {NORMAL_RUNS[judged]}: {worst:.2f}")


def golden(plant, score, runs):
    """Windows of normal operation, of every fault early and late, and of a recovery, with what onnxruntime says."""
    rng = np.random.default_rng(1000)
    picks = [("normal, " + path, runs[i][100]) for i, path in enumerate(NORMAL_RUNS)]
    for fault, onset, end in plant.onsets():
        for minutes in (5, 45, 115):
            picks.append((f"{fault}, {minutes} min after onset", plant.loop_windows(onset + minutes * 60, 60, rng)[0]))
        picks.append((f"{fault}, 10 min into the recovery", plant.loop_windows(end + 600, 60, rng)[0]))
    vectors = []
    for name, window in picks:
        window = np.array([float(f"{v:.7g}") for v in window])
        scores, shares = score(window[None, :])
        vectors.append(
            {
                "name": name,
                "features": [float(v) for v in window],
                "score": round(float(scores[0]), 6),
                "contributions": [round(float(v), 6) for v in shares[0]],
            }
        )
    return json.dumps({"tolerance": TOLERANCE, "inputs": plant.devices(), "vectors": vectors}, indent=1) + "\n"


def describe(plant, model):
    """model.toml"""
    devices = "".join(f'    "{d}",\n' for d in plant.devices())
    return f'''# Made by deploy/train/train.py: change it there. Its doc and deploy/train/README.md say what the model is.

schema = 2
name = "tep-process"
version = "1.0.0"
description = "Hotelling T2 of one-minute means against normal operation of the Tennessee Eastman process"
sha256 = "{hashlib.sha256(model).hexdigest()}"    # of model.onnx

# One score per tumbling event-time window. Inputs stand in this order in the tensor `features` [1, {len(plant.inputs)}],
# float32, each the mean of the device's readings in the window that are not bad, in the unit in which the
# device reports on the edge. A window in which any input has none is not scored, and neither counts for nor
# against an event.
span = "{WINDOW_S}s"
hop = "{WINDOW_S}s"
features = ["mean"]
inputs = [
{devices}]

# `score` [1]: 1.0 is the highest level kept up for raise_after windows in normal operation.
# `contributions` [1, {len(plant.inputs)}]: each input's share of the score, 0 to 1; the event names the largest.
threshold = 1.0
clear_threshold = {CLEAR_THRESHOLD}
raise_after = {RAISE_AFTER}         # windows in a row with score > threshold
clear_after = {CLEAR_AFTER}        # windows in a row with score < clear_threshold

# Severity of an event by the highest score so far: the last entry whose `score` it has reached.
[[severity]]
name = "warning"
score = 1.0

[[severity]]
name = "critical"
score = {CRITICAL}

[training]
data = {json.dumps(NORMAL_RUNS)}
statement = "73 h of normal operation of a simulator, read through the demo plant's instruments; no row of the demo's loop"
unit_note = "flows at standard conditions in m3/h, pressures in kPa gauge, as in firmware-sim/data/plant.toml"
'''


def same(name, path, data):
    """Whether a committed file equals a fresh one: byte for byte, golden values within their tolerance."""
    if not path.is_file():
        return False
    if name != "golden.json":
        return path.read_bytes() == data
    old, new = json.loads(path.read_bytes()), json.loads(data)
    numbers = lambda g: np.array([[v["score"], *v["contributions"], *v["features"]] for v in g["vectors"]])
    names = lambda g: (g["tolerance"], g["inputs"], [v["name"] for v in g["vectors"]])
    return names(old) == names(new) and np.allclose(numbers(old), numbers(new), rtol=TOLERANCE, atol=TOLERANCE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare the committed bundle with a fresh fit")
    check = parser.parse_args().check

    plant = Plant()
    runs = [plant.run_windows(path, np.random.default_rng([seed, i]))
            for seed in FIT_SEEDS for i, path in enumerate(NORMAL_RUNS)]
    model = build(*fit(runs))
    score = scorer(model)
    bundle = {
        "model.onnx": model,
        "model.toml": describe(plant, model).encode(),
        "golden.json": golden(plant, score, runs).encode(),
    }
    if check:
        stale = [name for name, data in bundle.items() if not same(name, BUNDLE / name, data)]
        if stale:
            sys.exit(f"{BUNDLE}: {', '.join(stale)} differ from a fresh fit; run deploy/train/train.py and commit")
        print(f"{BUNDLE.name}: equals a fresh fit")
    else:
        BUNDLE.mkdir(parents=True, exist_ok=True)
        for name, data in bundle.items():
            (BUNDLE / name).write_bytes(data)
    report(plant, score, runs)


if __name__ == "__main__":
    main()
