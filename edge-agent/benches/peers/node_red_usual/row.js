// The row's time becomes a property, which the split node leaves on every reading. What ends the table goes the same
// way as the readings: a message that is complete, of one element since the split node drops what has none.
// --- on message
const complete = { complete: true, payload: [true] };
if (!msg.payload) return msg.complete ? complete : null;
const time = global.get("job").time;
msg.ts = Date.parse(msg.payload[time]);
delete msg.payload[time];
if (!msg.complete) return msg;
delete msg.complete;
return [[msg, complete]];
