"""Judges the agent's Modbus source against pymodbus, over TCP and, through pseudo-terminals, over RTU.

    judge_modbus.py EDGE_AGENT

pymodbus serves three slaves with registers that it encodes itself. `edge-agent sensors` must read each of them, with
its unit; a fourth slave that is not there has no value and costs the others nothing. Then the agent runs, the server
goes away and comes back, and what the agent counts must add up.
"""

import asyncio
import contextlib
import os
import re
import sys
import tempfile
import time
import tty
import urllib.request

from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from process import free_port
from report import Report

# Per unit: (table, address, how pymodbus encodes it, what it encodes, keys of the register, unit, the value read).
METER = 1
PLC = 2
SMALL = 3
DEAD = 9
REGISTERS = [
    (PLC, "holding", 0, DataType.INT16, -123, {"type": "i16", "scale": 0.1}, "Cel", -12.3),
    (PLC, "holding", 1, DataType.UINT16, 65000, {"type": "u16"}, "/min", 65000.0),
    (PLC, "holding", 2, DataType.INT32, -70000, {"type": "i32", "scale": 0.001}, "bar", -70.0),
    (PLC, "holding", 4, DataType.UINT32, 4000000000, {"type": "u32"}, "1", 4e9),
    (PLC, "holding", 6, DataType.FLOAT64, 3.141592653589793, {"type": "f64"}, "1", 3.141592653589793),
    (PLC, "holding", 10, DataType.UINT64, 1 << 52, {"type": "u64"}, "1", float(1 << 52)),
    (PLC, "holding", 14, DataType.INT64, -(1 << 40), {"type": "i64"}, "1", -float(1 << 40)),
    # 0x00012345 with the low word first, then with the bytes of each word swapped.
    (PLC, "holding", 18, DataType.REGISTERS, [0x2345, 0x0001], {"type": "u32", "word_order": "little"}, "1", 74565.0),
    (PLC, "holding", 20, DataType.REGISTERS, [0x0100, 0x4523], {"type": "u32", "byte_order": "little"}, "1", 74565.0),
    (PLC, "holding", 22, DataType.REGISTERS, 0b1000, {"bit": 3}, "1", 1.0),
    (PLC, "holding", 23, DataType.REGISTERS, 0x8000, {"type": "i16", "no_value": "[0x8000]"}, "Cel", None),
    (PLC, "coil", 3, DataType.BITS, True, {}, "1", 1.0),
    (PLC, "discrete", 12, DataType.BITS, False, {}, "1", 0.0),
    (SMALL, "input", 100, DataType.FLOAT32, 21.5, {"type": "f32"}, "Cel", 21.5),
    # The simulator has no such register.
    (SMALL, "input", 500, None, None, {"type": "u16"}, "1", None),
    (DEAD, "input", 0, None, None, {"type": "u16"}, "1", None),
]
# Addresses of the SDM120's protocol description; the profile names them.
PROFILE = {
    "voltage": (0x0000, 230.2, "V"),
    "current": (0x0006, 4.75, "A"),
    "power": (0x000C, -1093.5, "W"),
    "power-factor": (0x001E, 0.875, "1"),
    "frequency": (0x0046, 49.98, "Hz"),
    "energy-import": (0x0048, 1551.374, "kW.h"),
    "energy-export": (0x004A, 1335.694, "kW.h"),
    "energy-total": (0x0156, 2887.068, "kW.h"),
}


def devices():
    """The simulated slaves. Gaps of the meter read 0, as the real one's do."""
    nothing = [SimData(60000, values=0, datatype=DataType.REGISTERS)]
    no_bits = [SimData(60000, values=False, datatype=DataType.BITS)]
    meter, end = [], 0
    for address, value, _ in sorted(PROFILE.values()):
        if end < address < end + 40:
            meter.append(SimData(end, values=[0] * (address - end), datatype=DataType.REGISTERS))
        meter.append(SimData(address, values=value, datatype=DataType.FLOAT32))
        end = address + 2
    found = [SimDevice(METER, simdata=(no_bits, no_bits, nothing, meter))]
    for unit in (PLC, SMALL):
        tables = {"coil": [], "discrete": [], "holding": [], "input": []}
        for of, table, address, kind, value, *_ in REGISTERS:
            if of == unit and kind is not None:
                tables[table].append(SimData(address, values=value, datatype=kind))
        blocks = [tables[name] or (no_bits if name in ("coil", "discrete") else nothing) for name in tables]
        found.append(SimDevice(unit, simdata=tuple(blocks)))
    return found


def configuration(folder, bus, mqtt_port, metrics_port):
    """The agent's configuration, and what it should read: device to (value, unit)."""
    wanted = {f"meter/{name}": (value, unit) for name, (_, value, unit) in PROFILE.items()}
    text = [
        'site = "judge"', 'gateway = "gw"', f'data_dir = "{folder}"',
        "[mqtt]", f'url = "mqtt://127.0.0.1:{mqtt_port}"',
        "[metrics]", f'listen = "127.0.0.1:{metrics_port}"',
        "[[asset]]", 'id = "rig"',
    ]  # fmt: skip
    slaves = [f"[[modbus]]\n{bus}\ntimeout = \"300ms\"\n[[modbus.slave]]\nunit = {METER}\nperiod = \"1s\""]
    mapping = ", ".join(f'{name} = "meter/{name}"' for name in PROFILE)
    slaves.append(f'profile = "eastron-sdm120"\ndevices = {{ {mapping} }}')
    last = None
    for number, (unit, table, address, _, _, keys, ucum, value) in enumerate(REGISTERS):
        if unit != last:
            slaves.append(f'[[modbus.slave]]\nunit = {unit}\nperiod = "1s"')
            last = unit
        device = f"u{unit}/{table}-{address}-{number}"
        wanted[device] = (value, ucum)
        slaves.append(f'[[modbus.slave.register]]\ndevice = "{device}"\ntable = "{table}"\naddress = {address}')
        for key, given in keys.items():
            quoted = f'"{given}"' if isinstance(given, str) and not given.startswith("[") else given
            slaves.append(f"{key} = {quoted}")
    for device, (_, unit) in wanted.items():
        text.append(f'[[device]]\nid = "{device}"\ntype = "own"\nasset = "rig"\nunit = "{unit}"')
    path = os.path.join(folder, "agent.toml")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(text + slaves) + "\n")
    return path, wanted


@contextlib.asynccontextmanager
async def serving(server):
    task = asyncio.ensure_future(server.serve_forever())
    try:
        await asyncio.sleep(0.3)
        if task.done():
            task.result()
        yield
    finally:
        await server.shutdown()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def without_dead(unit_at):
    """Drops what is for the slave that is not there: the simulator would answer for it with an exception."""

    def trace(sending, packet):
        return b"" if not sending and packet[unit_at : unit_at + 1] == bytes([DEAD]) else packet

    return trace


def tcp_server(port):
    return ModbusTcpServer(devices(), address=("127.0.0.1", port), trace_packet=without_dead(6))


@contextlib.contextmanager
def null_modem():
    """Two pseudo-terminals whose far ends are joined."""
    loop = asyncio.get_running_loop()
    (a, near_a), (b, near_b) = os.openpty(), os.openpty()

    def copy(source, sink):
        with contextlib.suppress(OSError):
            os.write(sink, os.read(source, 4096))

    for fd in (near_a, near_b):
        tty.setraw(fd)
    loop.add_reader(a, copy, a, b)
    loop.add_reader(b, copy, b, a)
    try:
        yield os.ttyname(near_a), os.ttyname(near_b)
    finally:
        for fd in (a, b):
            loop.remove_reader(fd)
        for fd in (a, b, near_a, near_b):
            os.close(fd)


async def output(*command):
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def judge_sensors(report, agent, config, wanted, kind):
    began = time.monotonic()
    status, out, err = await output(agent, "sensors", "--config", config)
    seconds = time.monotonic() - began
    report.check(status == 1, f"{kind}: sensors tells by its exit status that some have no value", f"{status}\n{err}")
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    report.check(set(lines) == set(wanted), f"{kind}: sensors lists {len(wanted)} devices", f"{out}\n{err}")
    for device, (value, unit) in wanted.items():
        line = lines.get(device, "")
        if value is None:
            report.check(line.startswith("no value"), f"{kind}: {device} has no value", line)
            continue
        number = re.fullmatch(r"(\S+) (\S+) \(good\)", line)
        # pymodbus encodes FLOAT32 from a double: seven digits arrive.
        close = number and abs(float(number[1]) - value) <= 1e-6 * max(1.0, abs(value)) and number[2] == unit
        report.check(close, f"{kind}: {device} is {value} {unit}", line)
    report.check(seconds < 5, f"{kind}: a dead slave does not hold it up ({seconds:.1f} s)")


def metric(port, name, **labels):
    """The value of a metric, 0 where there is none."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        for line in response.read().decode().splitlines():
            found = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
            if found and dict(re.findall(r'(\w+)="(.*?)"', found[1])) == labels:
                return float(found[2])
    return 0.0


async def judge_run(report, agent, config, wanted, modbus_port, metrics_port, log):
    """The server is there, goes away, comes back."""
    def scrape():
        polled = metric(metrics_port, "tailrace_edge_readings_total", stage="source", outcome="polled")
        skipped = metric(metrics_port, "tailrace_edge_readings_total", stage="source", outcome="skipped")
        passed = metric(metrics_port, "tailrace_edge_readings_total", stage="filter", outcome="passed")
        faults = {
            reason: metric(metrics_port, "tailrace_edge_source_faults_total", reason=reason)
            for reason in ("open", "away", "timeout", "exception")
        }
        return polled, skipped, passed, faults

    async def until(what, holds, seconds=20):
        deadline = time.monotonic() + seconds
        seen = None
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                seen = await asyncio.to_thread(scrape)
                if holds(*seen):
                    return report.check(True, f"run: {what}")
            await asyncio.sleep(0.2)
        with open(log, encoding="utf-8", errors="replace") as f:
            return report.check(False, f"run: {what}", f"{seen}\n{f.read()[-3000:]}")

    with open(log, "wb") as sink:
        process = await asyncio.create_subprocess_exec(agent, "run", "--config", config, stderr=sink)
    try:
        async with serving(tcp_server(modbus_port)):
            await until("it reads, and counts the dead slave and the refused request",
                        lambda polled, _s, _p, faults: polled >= 3 * len(wanted)
                        and faults["timeout"] >= 1 and faults["exception"] >= 2 and faults["open"] == 0)  # fmt: skip
        await until("the server is gone", lambda _p, _s, _f, faults: faults["open"] >= 1)
        async with serving(tcp_server(modbus_port)):
            before = await asyncio.to_thread(scrape)
            await until("the server is read again",
                        lambda _p, _s, _f, faults: faults["exception"] >= before[3]["exception"] + 2)  # fmt: skip
        polled, skipped, passed, _ = await asyncio.to_thread(scrape)
        report.check(polled == skipped + passed, "run: polled = skipped + passed on", f"{polled} {skipped} {passed}")
    finally:
        process.terminate()
        status = await asyncio.wait_for(process.wait(), 30)
    report.check(status == 0, "run: a clean stop", status)


async def judge(report, agent):
    with tempfile.TemporaryDirectory() as folder:
        port, mqtt_port, metrics_port = free_port(), free_port(), free_port()
        bus = f'url = "tcp://127.0.0.1:{port}"'
        config, wanted = configuration(folder, bus, mqtt_port, metrics_port)
        async with serving(tcp_server(port)):
            await judge_sensors(report, agent, config, wanted, "tcp")
        await judge_run(report, agent, config, wanted, port, metrics_port, os.path.join(folder, "agent.log"))
        with null_modem() as (ours, theirs):
            bus = f'url = "rtu://{ours}"\nbaud = 115200\nparity = "none"'
            config, wanted = configuration(folder, bus, mqtt_port, metrics_port)
            server = ModbusSerialServer(devices(), port=theirs, baudrate=115200, trace_packet=without_dead(0))
            async with serving(server):
                await judge_sensors(report, agent, config, wanted, "rtu")


def main():
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    report = Report("judge_modbus")
    asyncio.run(judge(report, os.path.abspath(sys.argv[1])))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
