// Statistics of every device a minute, by Welford's update.
const job = global.get("job");
context.set("state", { width: job.window_ms, ids: job.devices.map((device) => device.id), start: NaN, count: 0 });
// --- on message
const state = context.get("state");

function close() {
    const devices = [];
    state.slots.forEach((s, i) => {
        if (s.n === 0) return;
        const stddev = s.n > 1 ? Math.sqrt(s.m2 / (s.n - 1)) : null;
        const { n: count, min, max, mean, first, last } = s;
        devices.push({ device_id: state.ids[i], count, min, max, mean, stddev, first, last });
    });
    state.count += devices.length;
    const payload = { start: state.start, width_ms: state.width, devices };
    node.send([null, { topic: `${global.get("job").topic}/aggregates`, payload }], false);
}

if (msg.good) {
    const start = msg.ts - (msg.ts % state.width);
    if (start !== state.start) {
        if (state.slots) close();
        state.start = start;
        state.slots = state.ids.map(() => ({ n: 0, min: 0, max: 0, mean: 0, m2: 0, first: 0, last: 0 }));
    }
    for (let i = 0; i < msg.good.length; i++) {
        const value = msg.good[i];
        if (value !== value) continue;
        const s = state.slots[i];
        const fromMean = value - s.mean;
        s.n += 1;
        s.mean += fromMean / s.n;
        s.m2 += fromMean * (value - s.mean);
        if (s.n === 1) s.min = s.max = s.first = value;
        else if (value < s.min) s.min = value;
        else if (value > s.max) s.max = value;
        s.last = value;
    }
}
if (msg.complete) {
    if (state.slots) close();
    msg.totals.windows = state.count;
}
return msg;
