// Statistics of every device a minute, of its good values.
context.set("start", null);
context.set("values", {});
context.set("count", 0);
// --- on message
const { window_ms, topic } = global.get("job");

function statistics(values) {
    const count = values.length;
    const mean = values.reduce((sum, value) => sum + value, 0) / count;
    const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    const stddev = count > 1 ? Math.sqrt(squares / (count - 1)) : null;
    return {
        count, min: Math.min(...values), max: Math.max(...values), mean, stddev, first: values[0], last: values.at(-1),
    };
}

const start = msg.complete ? null : msg.ts - (msg.ts % window_ms);
if (start !== context.get("start")) {
    const values = Object.entries(context.get("values"));
    if (values.length > 0) {
        const devices = values.map(([device_id, values]) => ({ device_id, ...statistics(values) }));
        const payload = { start: context.get("start"), width_ms: window_ms, devices };
        node.send([{ topic: `${topic}/aggregates`, payload }, null]);
        context.set("count", context.get("count") + devices.length);
    }
    context.set("start", start);
    context.set("values", {});
}
if (msg.complete) return [null, { totals: { windows: context.get("count") } }];
if (msg.quality) return null;
const values = context.get("values");
(values[msg.topic] ??= []).push(msg.payload);
context.set("values", values);
return null;
