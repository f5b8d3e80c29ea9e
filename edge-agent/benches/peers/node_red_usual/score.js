// Scores a machine, with the state that its last score left; so one after the other.
const job = global.get("job");
context.set("session", await global.get("ort").InferenceSession.create(job.model, { intraOpNumThreads: 1 }));
context.set("machines", Object.fromEntries(job.machines.map((machine) => [machine.name, machine])));
context.set("states", Object.fromEntries(job.machines.map(({ name }) => [name, new Array(job.state).fill(0)])));
context.set("after", Promise.resolve());
// --- on message
const { Tensor } = global.get("ort");

async function score() {
    const row = (values) => new Tensor("float32", values, [1, values.length]);
    const machine = context.get("machines")[msg.topic];
    const states = context.get("states");
    const given = await context.get("session").run({
        features: row(msg.payload),
        state: row(states[msg.topic]),
        location: row(machine.location),
        scale: row(machine.scale),
        drift: row(machine.drift),
        threshold: row([machine.threshold]),
    });
    states[msg.topic] = Array.from(given.state_out.data);
    context.set("states", states);
    msg.payload = { score: given.score.data[0], contributions: Array.from(given.contributions.data) };
    return msg;
}

const after = msg.complete ? context.get("after").then(() => msg) : context.get("after").then(score);
context.set("after", after);
return await after;
