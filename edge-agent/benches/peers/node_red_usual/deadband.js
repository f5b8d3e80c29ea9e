// Passes what has moved, or was not sent for a heartbeat; a bad reading always, and so the one after it.
context.set("devices", Object.fromEntries(global.get("job").devices.map((device) => [device.id, device])));
context.set("sent", {});
// --- on message
if (msg.complete) return msg;
const { deadband, heartbeat_ms } = context.get("devices")[msg.topic];
const sent = context.get("sent");
const last = sent[msg.topic];
if (
    deadband !== null && last && !last.quality && !msg.quality &&
    Math.abs(msg.payload - last.value) <= deadband && msg.ts - last.ts < heartbeat_ms
) {
    return null;
}
sent[msg.topic] = { value: msg.payload, ts: msg.ts, quality: msg.quality };
context.set("sent", sent);
return msg;
