// Range: `good` has NaN where a value is bad, `bad` the numbers of those devices.
const limit = (value, none) => (value === null ? none : value);
const devices = global.get("job").devices;
context.set("state", {
    low: devices.map((device) => limit(device.low, -Infinity)),
    high: devices.map((device) => limit(device.high, Infinity)),
    marked: 0,
});
// --- on message
const state = context.get("state");
if (msg.values) {
    const { low, high } = state;
    msg.bad = [];
    msg.good = msg.values;
    for (let i = 0; i < low.length; i++) {
        const value = msg.values[i];
        if (!(value >= low[i] && value <= high[i])) {
            if (msg.good === msg.values) msg.good = msg.values.slice();
            msg.good[i] = NaN;
            msg.bad.push(i);
        }
    }
    state.marked += msg.bad.length;
}
if (msg.complete) msg.totals = { bad: state.marked };
return msg;
