// A message of the readings of a second.
context.set("second", null);
context.set("readings", []);
context.set("sent", 0);
// --- on message
const readings = context.get("readings");
const second = msg.complete ? null : Math.floor(msg.ts / 1000);
if (second !== context.get("second")) {
    if (readings.length > 0) {
        node.send([{ topic: `${global.get("job").topic}/readings`, payload: readings }, null]);
        context.set("sent", context.get("sent") + readings.length);
    }
    context.set("second", second);
    context.set("readings", []);
}
if (msg.complete) return [null, { totals: { ...msg.totals, sent: context.get("sent") } }];
const reading = { device_id: msg.topic, timestamp: new Date(msg.ts).toISOString(), value: msg.payload };
if (msg.quality) reading.quality = msg.quality;
context.get("readings").push(reading);
return null;
