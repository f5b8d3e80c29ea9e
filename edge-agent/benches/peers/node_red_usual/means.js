// A message a machine every second: the means of the last seconds of its inputs.
const job = global.get("job");
const machineOf = {};
for (const { name, inputs } of job.machines) {
    const machine = { name, inputs: inputs.map((i) => job.devices[i].id), second: null, recent: {} };
    for (const id of machine.inputs) {
        machineOf[id] = machine;
        machine.recent[id] = [];
    }
}
context.set("machineOf", machineOf);
// --- on message
const span = global.get("job").span_s;
const machineOf = context.get("machineOf");

/** Ends the second under way: a message of the window that ends with it, if it is whole. */
function close(machine) {
    machine.second += 1;
    const end = machine.second * 1000;
    if (machine.second - span < machine.begun) return;
    const features = [];
    for (const id of machine.inputs) {
        const recent = machine.recent[id].filter((reading) => reading.ts >= end - span * 1000);
        machine.recent[id] = recent;
        features.push(recent.reduce((sum, reading) => sum + reading.value, 0) / recent.length);
    }
    if (features.every(Number.isFinite)) node.send({ topic: machine.name, payload: features, end });
}

if (msg.complete) {
    for (const machine of new Set(Object.values(machineOf))) if (machine.second !== null) close(machine);
    return { complete: true };
}
const machine = machineOf[msg.topic];
if (!machine) return null;
if (machine.second === null) {
    machine.second = Math.floor(msg.ts / 1000);
    machine.begun = Math.ceil(msg.ts / 1000);
}
while (machine.second < Math.floor(msg.ts / 1000)) close(machine);
if (!msg.quality) machine.recent[msg.topic].push({ ts: msg.ts, value: msg.payload });
return null;
