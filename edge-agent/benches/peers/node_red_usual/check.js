// Range: a reading (payload, of the device that is the topic) out of it or missing gets a quality.
context.set("limits", Object.fromEntries(global.get("job").devices.map((device) => [device.id, device])));
context.set("totals", { read: 0, bad: 0 });
// --- on message
const BAD = 2; // quality
const totals = context.get("totals");
if (msg.complete) return { complete: true, totals };
const device = context.get("limits")[msg.topic];
if (!device) return null;
const value = msg.payload;
totals.read += 1;
if (
    typeof value !== "number" ||
    (device.low !== null && value < device.low) ||
    (device.high !== null && value > device.high)
) {
    msg.quality = BAD;
    totals.bad += 1;
}
context.set("totals", totals);
return msg;
