"""Writes the model bundle edge-agent/examples/models/level-shift: has the level of any input shifted?

    python deploy/train/level_shift.py            writes the bundle
    python deploy/train/level_shift.py --check    fails unless the committed bundle equals a fresh one

A general statistical detector of a handful of parameters. Nothing in it is fitted here: what a machine looks like
comes from its own calibration (`edge-agent calibrate`). README.md says how well it does, and on what. Per window,
with the calibration's location, scale and drift of every input and a slow baseline b (0 at first) as state:

    u = (mean - location) / sqrt(scale^2 + drift^2) - b
    score = max |u|
    b <- b + alpha u, unless the score was above the threshold within the last HOLD windows

So a slow drift is followed and a shift is not: in alarm the baseline stands still. An input's contribution is its
share of the sum of |u|.
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

BUNDLE = Path(__file__).resolve().parents[2] / "edge-agent" / "examples" / "models" / "level-shift"
INPUTS = ["*/vibration-1", "*/vibration-2", "*/pressure", "*/flow"]
SPAN_S = 10
HOP_S = 1
THRESHOLD = 3.0
HOLD = 20  # windows
HALF_LIFE_S = 400
SETTLE = 0.4
DRIFT_LAG = 0.33
HORIZON_MIN = 40
CRITICAL = 10.0
TOLERANCE = 1e-4


def build():
    """The ONNX graph, for any number n of inputs and a row a machine; the state is [windows left of the hold, baseline
    of every input]."""
    constant = lambda name, value, kind=np.float32: numpy_helper.from_array(np.asarray(value, kind), name)
    alpha = 1.0 - 0.5 ** (HOP_S / HALF_LIFE_S)
    node = helper.make_node
    nodes = [
        node("Mul", ["scale", "scale"], ["scale_squared"]),
        node("Mul", ["drift", "drift"], ["drift_squared"]),
        node("Add", ["scale_squared", "drift_squared"], ["variance"]),
        node("Sqrt", ["variance"], ["spread"]),
        node("Sub", ["features", "location"], ["centred"]),
        node("Div", ["centred", "spread"], ["z"]),
        node("Slice", ["state", "zero", "one", "one"], ["hold"]),
        node("Slice", ["state", "one", "end", "one"], ["baseline"]),
        node("Sub", ["z", "baseline"], ["u"]),
        node("Abs", ["u"], ["size"]),
        node("ReduceMax", ["size"], ["score"], axes=[1], keepdims=0),
        # Above the threshold the hold begins again; else it runs down.
        node("ReduceMax", ["size"], ["largest"], axes=[1], keepdims=1),
        node("Greater", ["largest", "threshold"], ["is_above"]),
        node("Cast", ["is_above"], ["above"], to=TensorProto.FLOAT),
        node("Mul", ["above", "hold_windows"], ["begun"]),
        node("Sub", ["hold", "unit"], ["less"]),
        node("Max", ["less", "begun"], ["longer"]),
        node("Max", ["longer", "nought"], ["hold_out"]),
        # 1 when nothing holds the baseline.
        node("Min", ["hold_out", "unit"], ["held"]),
        node("Sub", ["unit", "held"], ["free"]),
        node("Mul", ["free", "alpha"], ["weight"]),
        node("Mul", ["u", "weight"], ["step"]),
        node("Add", ["baseline", "step"], ["baseline_out"]),
        node("Concat", ["hold_out", "baseline_out"], ["state_out"], axis=1),
        node("ReduceSum", ["size", "one"], ["sum"], keepdims=1),
        node("Add", ["sum", "tiny"], ["total"]),
        node("Div", ["size", "total"], ["contributions"]),
    ]
    tensor = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "level-shift",
        [
            tensor("features", "machines", "n"),
            tensor("location", "machines", "n"),
            tensor("scale", "machines", "n"),
            tensor("drift", "machines", "n"),
            tensor("threshold", "machines", 1),
            tensor("state", "machines", "m"),
        ],
        [
            tensor("score", "machines"),
            tensor("contributions", "machines", "n"),
            tensor("state_out", "machines", "m"),
        ],
        [
            constant("zero", [0], np.int64),
            constant("one", [1], np.int64),
            constant("end", [1 << 30], np.int64),
            constant("hold_windows", [[HOLD]]),
            constant("unit", [[1.0]]),
            constant("nought", [[0.0]]),
            constant("alpha", [[alpha]]),
            constant("tiny", [[1e-12]]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="tailrace")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def golden(model):
    """Windows of a made-up machine: at rest, each input shifted, during and after the hold, and with its baseline away."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    location = [0.2, 0.28, 0.05, 122.5]
    scale = [0.002, 0.003, 0.11, 0.4]
    drift = [0.001, 0.004, 0.02, 0.5]
    spread = np.sqrt(np.square(scale) + np.square(drift))
    calibration = {"location": location, "scale": scale, "drift": drift, "threshold": THRESHOLD}
    fixed = {k: np.array(v, np.float32).reshape(1, -1) for k, v in calibration.items()}
    rest = [0.0, 0.0, 0.0, 0.0, 0.0]
    cases = [("at rest", [0.1, -0.2, 0.5, 0.0], rest)]
    for i, name in enumerate(INPUTS):
        cases.append((f"{name} shifted up", [4.0 * (i == j) for j in range(4)], rest))
        cases.append((f"{name} shifted down", [-9.0 * (i == j) for j in range(4)], rest))
    cases += [
        ("just below the threshold", [0.0, 0.0, 0.0, THRESHOLD - 0.01], rest),
        ("just above the threshold", [0.0, 0.0, 0.0, THRESHOLD + 0.01], rest),
        ("held", [1.0, 0.5, 0.0, 0.0], [12.0, 0.2, 0.1, 0.0, -0.3]),
        ("last window of the hold", [1.0, 0.5, 0.0, 0.0], [1.0, 0.2, 0.1, 0.0, -0.3]),
        ("above again while held", [0.0, 0.0, -5.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0]),
        ("the baseline has followed", [0.0, 5.0, 0.0, -4.0], [0.0, 0.1, 4.5, 0.0, -4.2]),
        ("back where the baseline came from", [0.0, 0.0, 0.0, 0.0], [0.0, 0.1, 4.5, 0.0, -4.2]),
    ]
    vectors = []
    for name, z, state in cases:
        features = [float(f"{v:.7g}") for v in np.array(location) + np.array(z) * spread]
        feeds = {"features": np.array([features], np.float32), "state": np.array([state], np.float32), **fixed}
        score, shares, after = session.run(["score", "contributions", "state_out"], feeds)
        vectors.append(
            {
                "name": name,
                "features": features,
                "state": state,
                "score": round(float(score[0]), 6),
                "contributions": [round(float(v), 6) for v in shares[0]],
                "state_out": [round(float(v), 6) for v in after[0]],
            }
        )
    document = {"tolerance": TOLERANCE, "inputs": INPUTS, "calibration": calibration, "vectors": vectors}
    return json.dumps(document, indent=1) + "\n"


def describe(model):
    """model.toml"""
    inputs = "".join(f'    "{name}",\n' for name in INPUTS)
    return f'''# Made by deploy/train/level_shift.py: change it there. Its doc and deploy/train/README.md say what the model is.

schema = 2
name = "level-shift"
version = "1.0.1"
description = "Shift of the level of any input against a slow baseline, in units of its own spread"
sha256 = "{hashlib.sha256(model).hexdigest()}"    # of model.onnx

# A score every hop, of the means of the last span. What * stands for names a machine: one detector each.
span = "{SPAN_S}s"
hop = "{HOP_S}s"
features = ["mean"]
inputs = [
{inputs}]
state = {1 + len(INPUTS)}               # windows left of the hold, and the baseline of every input

# The score is the largest deviation of an input from its baseline, in units of the spread that it had when
# calibrated. The calibration raises the threshold where the machine's own clean window went above it.
threshold = {THRESHOLD}
clear_threshold = {THRESHOLD}
raise_after = 1
clear_after = {HOLD}

# How `edge-agent calibrate` fits location, scale and drift.
[calibration]
settle = {SETTLE}            # this share of the recording, at its start, is left out: machines settle
drift_lag = {DRIFT_LAG}        # drift is the root mean square of how far a mean moves within this share of the rest
horizon = "{HORIZON_MIN}min"      # refused where the trend of the rest would by itself reach the threshold within this

[[severity]]
name = "warning"
score = 0.0

[[severity]]
name = "critical"
score = {CRITICAL}
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare the committed bundle with a fresh one")
    check = parser.parse_args().check

    model = build()
    bundle = {
        "model.onnx": model,
        "model.toml": describe(model).encode(),
        "golden.json": golden(model).encode(),
    }
    if not check:
        BUNDLE.mkdir(parents=True, exist_ok=True)
        for name, data in bundle.items():
            (BUNDLE / name).write_bytes(data)
        return
    stale = [name for name, data in bundle.items() if (BUNDLE / name).read_bytes() != data]
    if stale:
        sys.exit(f"{BUNDLE}: {', '.join(stale)} differ from fresh ones; run deploy/train/level_shift.py and commit")
    print(f"{BUNDLE.name}: equals a fresh one")


if __name__ == "__main__":
    main()
