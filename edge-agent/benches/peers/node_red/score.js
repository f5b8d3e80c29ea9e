// Scores every machine every second, of the means of the last seconds of its inputs, and raises anomalies. Windows
// are scored one after the other, while rows go on.
const job = global.get("job");
const flat = (key) => job.machines.map((machine) => machine[key]).flat();
const width = job.machines[0].inputs.length;
context.set("state", {
    session: await global.get("ort").InferenceSession.create(job.model, { intraOpNumThreads: 1 }),
    inputs: flat("inputs"),
    width,
    given: { location: flat("location"), scale: flat("scale"), drift: flat("drift"), threshold: flat("threshold") },
    carried: job.machines.map(() => new Array(job.state).fill(0)),
    ring: Array.from({ length: job.span_s }, () => ({ sums: flat("inputs").fill(0), counts: flat("inputs").fill(0) })),
    second: NaN,
    after: Promise.resolve(),
    episodes: job.machines.map(() => ({ above: 0, below: 0, open: null })),
    totals: { scores: 0, score_sum: 0, first_scores: [], raised: 0, open: 0 },
});
// --- on message
const job = global.get("job");
const state = context.get("state");

/** Closes the second under way: its window is scored once those before it are. */
function close() {
    const { ring, inputs, width, second } = state;
    if (second - job.span_s + 1 >= state.begun) {
        const features = [];
        const which = [];
        for (let machine = 0; machine < job.machines.length; machine++) {
            const means = [];
            for (let i = machine * width; i < (machine + 1) * width; i++) {
                let sum = 0;
                let count = 0;
                for (const hop of ring) {
                    sum += hop.sums[i];
                    count += hop.counts[i];
                }
                if (count > 0) means.push(sum / count);
            }
            if (means.length < width) continue;
            which.push(machine);
            features.push(...means);
        }
        if (which.length > 0) state.after = state.after.then(() => score(which, features, (second + 1) * 1000));
    }
    state.second += 1;
    const oldest = ring[state.second % job.span_s];
    oldest.sums.fill(0);
    oldest.counts.fill(0);
}

async function score(which, features, end) {
    const { Tensor } = global.get("ort");
    const whole = which.length === job.machines.length;
    const tensor = (values, n) => new Tensor("float32", values, [which.length, n]);
    const of = (values, n) => (whole ? values : which.flatMap((m) => values.slice(m * n, (m + 1) * n)));
    const { width } = state;
    const feeds = {
        features: tensor(features, width),
        state: tensor(which.flatMap((machine) => state.carried[machine]), job.state),
        threshold: tensor(of(state.given.threshold, 1), 1),
    };
    for (const key of ["location", "scale", "drift"]) feeds[key] = tensor(of(state.given[key], width), width);
    const given = await state.session.run(feeds);
    const scores = given.score.data;
    const totals = state.totals;
    totals.scores += scores.length;
    if (totals.first_scores.length < 3) totals.first_scores.push(Array.from(scores));
    which.forEach((machine, at) => {
        totals.score_sum += scores[at];
        state.carried[machine] = Array.from(given.state_out.data.subarray(at * job.state, (at + 1) * job.state));
        judge(machine, scores[at], given.contributions.data.subarray(at * width, (at + 1) * width), end);
    });
}

function judge(machine, score, contributions, end) {
    const { name, threshold } = job.machines[machine];
    const episode = state.episodes[machine];
    episode.above = score > threshold ? episode.above + 1 : 0;
    episode.below = score < job.rules.clear_threshold ? episode.below + 1 : 0;
    const raises = !episode.open && episode.above >= job.rules.raise_after;
    if (raises) {
        episode.open = { machine: name, started_at: end, score: 0, threshold };
        state.totals.raised += 1;
    }
    if (!episode.open) return;
    if (score > episode.open.score) {
        const severity = job.rules.severity.findLast((severity) => score >= severity.score).name;
        Object.assign(episode.open, { score, severity, input: contributions.indexOf(Math.max(...contributions)) });
    }
    const clears = episode.below >= job.rules.clear_after;
    if (clears) episode.open.ended_at = end;
    if (raises || clears) {
        node.send([null, { topic: `${job.topic}/anomalies`, payload: { ...episode.open } }], false);
    }
    if (clears) state.episodes[machine] = { above: 0, below: 0, open: null };
}

if (msg.good) {
    const second = Math.floor(msg.ts / 1000);
    if (!(state.second >= 0)) {
        state.second = second;
        state.begun = Math.ceil(msg.ts / 1000);
    }
    while (state.second < second) close();
    const { sums, counts } = state.ring[second % job.span_s];
    const { inputs } = state;
    for (let i = 0; i < inputs.length; i++) {
        const value = msg.good[inputs[i]];
        if (value === value) {
            sums[i] += value;
            counts[i] += 1;
        }
    }
}
if (msg.complete) {
    close();
    await state.after;
    state.totals.open = state.episodes.filter((episode) => episode.open).length;
    Object.assign(msg.totals, state.totals);
}
return msg;
