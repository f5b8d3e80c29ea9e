// Publishes the totals once each of the branches has told its own.
context.set("branches", 0);
context.set("totals", {});
// --- on message
const BRANCHES = 3;
const totals = { ...context.get("totals"), ...msg.totals };
context.set("totals", totals);
context.set("branches", context.get("branches") + 1);
return context.get("branches") === BRANCHES ? { topic: `${global.get("job").topic}/done`, payload: totals } : null;
