// Reads the file once the broker is there: what mqtt out is given before, it would drop.
context.set("begun", false);
// --- on message
if (context.get("begun") || msg.status.fill !== "green") return null;
context.set("begun", true);
return {};
