"""Reads the simulated Modbus devices with pymodbus, as a client that does not know them.

    judge_plc.py FIRMWARE_SIM EDGE_AGENT

The PLC over TCP: every register must show what `plc --map` says of the same instant; refusals and faults must be
what is documented. The smart node over RTU on its pseudo-terminal: windows must fit what the plant shows, settings
must hold, and what is meant for others must not be answered. Of both, `edge-agent sensors` must read every value
with the configuration that they print.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from pymodbus.client import ModbusSerialClient, ModbusTcpClient
from pymodbus.exceptions import ModbusException

from process import free_port, running, wait_for_port
from report import Report

TYPES = ModbusTcpClient.DATATYPE
SIZES = {"i16": (TYPES.INT16, 1), "i32": (TYPES.INT32, 2), "f32": (TYPES.FLOAT32, 2)}
TIMEOUT = 0.5


def lines(program, *arguments):
    """The output of firmware-sim without its comments, each line split at blanks."""
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]


def register_map(program, *arguments):
    """The rows of `--map` by their column names."""
    header, *rows = lines(program, *arguments, "--map")
    return [dict(zip(header, row)) for row in rows]


def read(client, unit, table, address, count):
    """Registers of one request; an exception code as a number, no answer as None."""
    function = client.read_input_registers if table == "input" else client.read_holding_registers
    return outcome(lambda: function(address, count=count, device_id=unit))


def outcome(request):
    """What became of a request: its answer's registers, an exception code, or None where nothing came."""
    try:
        answer = request()
    except (ModbusException, ConnectionError):
        # A connection that is cut while something is under way is reset, and not closed.
        return None
    return answer.exception_code if answer.isError() else answer.registers


def decode(row, registers):
    """The value of a row in registers that begin with address 0, and half a step of it."""
    kind, words = SIZES[row["type"]]
    address, scale = int(row["address"]), float(row["scale"])
    own = registers[address : address + words]
    raw = ModbusTcpClient.convert_from_registers(own, kind, row["words"])
    step = abs(raw) * 2**-23 if row["type"] == "f32" else scale
    return raw * scale + float(row["offset"]), step / 2


def judge_values(report, program, client):
    rows = register_map(program, "plc")
    for unit in sorted({int(row["slave"]) for row in rows}):
        own = [row for row in rows if int(row["slave"]) == unit]
        table = own[0]["table"]
        end = max(int(row["address"]) + SIZES[row["type"]][1] for row in own)
        registers = read(client, unit, table, 0, end)
        if not report.check(isinstance(registers, list), f"unit {unit}: {end} {table} registers in one read", registers):
            continue
        millis = client.convert_from_registers(registers[:4], TYPES.UINT64)
        age = time.time() - millis / 1000
        report.check(0 <= age < 5, f"unit {unit}: shows the present", f"{age} s old")
        at = datetime.fromtimestamp(millis / 1000, timezone.utc).isoformat(timespec="milliseconds")
        wrong = []
        for row in (row for row in register_map(program, "plc", "--at", at) if int(row["slave"]) == unit):
            value, half = decode(row, registers)
            wanted = float(row["value"])
            if abs(value - wanted) > half + 1e-9 * max(1.0, abs(wanted)):
                wrong.append(f"{row['device']}: {value} is not {wanted}")
        report.none(wrong, f"unit {unit}: {len(own)} values are the plant's at {at}")
        other = "input" if table == "holding" else "holding"
        report.check(read(client, unit, other, 0, 4) == 2, f"unit {unit}: no {other} registers (exception 2)")
        report.check(read(client, unit, table, end - 1, 2) == 2, f"unit {unit}: nothing behind the last (exception 2)")
    first = read(client, 1, "input", 0, 4)
    time.sleep(0.3)
    report.check(read(client, 1, "input", 0, 4) > first, "time goes on")


def judge_refusals(report, client):
    report.check(read(client, 9, "input", 0, 1) == 11, "a unit that is not there (exception 11)")
    for what, request in [
        ("coils", lambda: client.read_coils(0, count=1, device_id=1)),
        ("discrete inputs", lambda: client.read_discrete_inputs(0, count=1, device_id=1)),
        ("a write", lambda: client.write_register(4, 1, device_id=2)),
        ("a write of many", lambda: client.write_registers(4, [1, 2], device_id=2)),
    ]:
        got = outcome(request)
        report.check(got == 1, f"{what}: not served (exception 1)", got)


def judge_agent(report, program, agent, scratch, *device):
    """What `edge-agent sensors` reads with the configuration that the device prints."""
    told = subprocess.run([program, *device, "--agent-config"], check=True, capture_output=True, text=True).stdout
    config = scratch / "edge-agent.toml"
    config.write_text(f'site = "lab"\ngateway = "gw-1"\ndata_dir = "{scratch}"\n\n{told}')
    read = subprocess.run([agent, "sensors", "--config", config], capture_output=True, text=True)
    good = {line.split(": ")[0] for line in read.stdout.splitlines() if line.endswith("(good)")}
    wanted = {row["device"] for row in register_map(program, *device)}
    report.check(
        read.returncode == 0 and good == wanted,
        f"edge-agent sensors: {len(wanted)} values of the {device[0]}",
        f"exit status {read.returncode}\n{read.stdout}\n{read.stderr}",
    )
    print("".join(f"        {line}\n" for line in read.stdout.splitlines()[:3]), end="")


def judge_faults(report, plc, log, connect):
    def fault(line):
        plc.stdin.write(f"{line}\n".encode())
        plc.stdin.flush()
        deadline = time.monotonic() + 10
        while f"fault: {line}" not in log.read_text().splitlines()[-1] and time.monotonic() < deadline:
            time.sleep(0.01)

    fault("late 200")
    with connect() as client:
        began = time.monotonic()
        came = isinstance(read(client, 1, "input", 0, 4), list)
        took = time.monotonic() - began
        report.check(came and took >= 0.2, "late 200: the answer comes 200 ms late", f"{took} s")
    fault("late 900")
    with connect() as client:
        report.check(read(client, 1, "input", 0, 4) is None, "late 900: too late for this client")
    fault("exception 6")
    with connect() as client:
        report.check(read(client, 1, "input", 0, 4) == 6, "exception 6: refused")
    fault("dead 1")
    with connect() as client:
        report.check(read(client, 1, "input", 0, 4) is None, "dead 1: unit 1 does not answer")
    with connect() as client:
        report.check(isinstance(read(client, 2, "holding", 0, 4), list), "dead 1: unit 2 does")
    fault("silent")
    with connect() as client:
        report.check(read(client, 2, "holding", 0, 4) is None, "silent: unit 2 does not either")
    fault("ok")
    with connect() as client:
        report.check(isinstance(read(client, 1, "input", 0, 4), list), "ok: unit 1 is back")
        fault("cut")
        report.check(read(client, 1, "input", 0, 4) is None, "cut: the connection is gone")
        fault("ok")
        # A connection that was reset, and not closed, is one that the client still holds to be open.
        client.close()
        client.connect()
        report.check(isinstance(read(client, 1, "input", 0, 4), list), "ok: and comes back")


def judge_plc(report, program, agent, scratch):
    refused = subprocess.run([program, "plc", "--listen", "0.0.0.0:0"], capture_output=True, text=True)
    report.check(
        refused.returncode == 1 and "not a loopback address" in refused.stderr,
        "listening beyond loopback is refused",
        refused.stderr,
    )
    port, log = free_port(), scratch / "plc.log"
    command = [program, "plc", "--listen", f"127.0.0.1:{port}", "--faults"]

    @contextlib.contextmanager
    def connect():
        client = ModbusTcpClient("127.0.0.1", port=port, timeout=TIMEOUT, retries=0)
        client.connect()
        try:
            yield client
        finally:
            client.close()

    with running(command, log, stdin=subprocess.PIPE) as plc:
        if not report.check(wait_for_port(port, 30, plc), "the PLC listens", log.read_text()):
            return
        with connect() as client:
            judge_values(report, program, client)
            judge_refusals(report, client)
        judge_agent(report, program, agent, scratch, "plc", "--listen", f"127.0.0.1:{port}")
        judge_faults(report, plc, log, connect)


def judge_node(report, program, agent, scratch):
    link, log = scratch / "node.tty", scratch / "node.log"
    with running([program, "node", "--link", link, "--address", "7"], log) as node:
        deadline = time.monotonic() + 30
        while not link.is_symlink() and node.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if not report.check(link.is_symlink(), "the node has a line", log.read_text()):
            return
        # A pseudo-terminal has no parity, and the C library refuses to set one on it.
        client = ModbusSerialClient(str(link), baudrate=19_200, parity="N", timeout=TIMEOUT, retries=0)
        client.connect()
        try:
            judge_registers(report, program, client)
        finally:
            client.close()
        judge_agent(report, program, agent, scratch, "node", "--link", link, "--address", "7")
        node.terminate()
        report.check(node.wait(20) == 0 and not link.is_symlink(), "SIGTERM ends it, and its link goes")


def judge_registers(report, program, client):
    got = read(client, 7, "input", 4, 16)
    report.check(got == 6, "features before the first window: busy (exception 6)", got)
    for window in (0, 3601):
        got = outcome(lambda: client.write_register(0, window, device_id=7))
        report.check(got == 3, f"a window of {window} s is refused (exception 3)", got)
    for what, request in [
        ("function 6", lambda: client.write_register(0, 4, device_id=7)),
        ("function 16", lambda: client.write_registers(0, [2], device_id=7)),
    ]:
        got = outcome(request)
        report.check(isinstance(got, list), f"the window is set by {what}", got)
    report.check(read(client, 7, "holding", 0, 1) == [2], "the window is 2 s now")
    report.check(read(client, 8, "input", 0, 1) is None, "another address is not answered")
    report.check(outcome(lambda: client.read_coils(0, count=1, device_id=7)) == 1, "no coils (exception 1)")
    report.check(read(client, 7, "input", 19, 2) == 2, "nothing behind the last register (exception 2)")
    began = time.monotonic()
    registers = None
    while not isinstance(registers, list) and time.monotonic() < began + 15:
        time.sleep(0.1)
        registers = read(client, 7, "input", 0, 20)
    if not report.check(isinstance(registers, list), "all 20 registers in one read, after a window", registers):
        return
    report.check(registers[2] >= 1 and registers[3] == 2, "two samples in the window", registers)
    features = {row["device"]: decode(row, registers)[0] for row in register_map(program, "node", "--address", "7")}
    plant = {row["device"]: float(row["value"]) for row in register_map(program, "plc")}
    # Ten times the noise that both have, in data/plant.toml.
    for quantity, tolerance in (("temperature", 0.3), ("humidity", 1.0)):
        mean, least, most, rms = (features[f"smart-node/{quantity}-{name}"] for name in ("mean", "min", "max", "rms"))
        now = plant[f"press/{quantity}"]
        report.check(abs(mean - now) < tolerance, f"the {quantity} is that of the press", f"{mean}, not {now}")
        report.check(
            least <= mean <= most and rms <= (most - least) / 2 + 0.001,
            f"mean, min, max and RMS of the {quantity} fit together",
            features,
        )


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    program, agent = (Path(name).absolute() for name in sys.argv[1:])
    report = Report("Modbus devices")
    with tempfile.TemporaryDirectory(prefix="tailrace-modbus.") as scratch:
        judge_plc(report, program, agent, Path(scratch))
        judge_node(report, program, agent, Path(scratch))
    sys.exit(report.finish())


if __name__ == "__main__":
    main()
