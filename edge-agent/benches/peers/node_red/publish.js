// The deadband (a bad value, NaN, is always sent, and so is the one after it), and a message for every second.
const devices = global.get("job").devices;
context.set("state", {
    lean: global.get("job").lean,
    ids: devices.map((device) => device.id),
    width: devices.map((device) => (device.deadband === null ? -1 : device.deadband)),
    heartbeat: devices.map((device) => device.heartbeat_ms),
    last: devices.map(() => NaN),
    at: devices.map(() => 0),
    second: NaN,
    rows: [],
    read: 0,
    sent: 0,
});
// --- on message
const BAD = 2; // quality
const state = context.get("state");
const topic = global.get("job").topic;

if (msg.values) {
    const second = Math.floor(msg.ts / 1000);
    if (second !== state.second) {
        if (state.rows.length > 0) node.send({ topic: `${topic}/readings`, payload: state.rows }, false);
        state.second = second;
        state.rows = [];
    }
    const { ids, width, heartbeat, last, at } = state;
    const sent = [];
    for (let i = 0; i < ids.length; i++) {
        const value = msg.good[i];
        if (Math.abs(value - last[i]) <= width[i] && msg.ts - at[i] < heartbeat[i]) continue;
        last[i] = value;
        at[i] = msg.ts;
        sent.push(i);
    }
    state.sent += sent.length;
    if (state.lean) {
        const values = {};
        for (const i of sent) values[ids[i]] = msg.values[i];
        const row = { ts: msg.ts, values };
        if (msg.bad.length > 0) row.bad = msg.bad.map((i) => ids[i]);
        state.rows.push(row);
    } else {
        const timestamp = new Date(msg.ts).toISOString();
        for (const i of sent) {
            const reading = { device_id: ids[i], timestamp, value: msg.values[i] };
            if (Number.isNaN(msg.good[i])) reading.quality = BAD;
            state.rows.push(reading);
        }
    }
    state.read += ids.length;
}
if (msg.complete) {
    if (state.rows.length > 0) node.send({ topic: `${topic}/readings`, payload: state.rows }, false);
    return { topic: `${topic}/done`, payload: { ...msg.totals, read: state.read, sent: state.sent } };
}
return null;
