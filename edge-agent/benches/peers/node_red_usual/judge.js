// Raises and clears the anomalies of a machine by its scores.
context.set("episodes", {});
context.set("scores", {});
context.set("totals", { scores: 0, score_sum: 0, raised: 0 });
// --- on message
const { machines, rules, topic } = global.get("job");
const [episodes, first, totals] = [context.get("episodes"), context.get("scores"), context.get("totals")];
if (msg.complete) {
    const open = Object.values(episodes).filter((episode) => episode.open).length;
    const named = machines.map(({ name }) => first[name] ?? []);
    const shortest = Math.min(...named.map((scores) => scores.length));
    const first_scores = [...Array(shortest).keys()].map((at) => named.map((scores) => scores[at]));
    return [null, { totals: { ...totals, first_scores, open } }];
}
const { score, contributions } = msg.payload;
totals.scores += 1;
totals.score_sum += score;
const kept = (first[msg.topic] ??= []);
if (kept.length < 3) kept.push(score);
const threshold = machines.find(({ name }) => name === msg.topic).threshold;
const episode = (episodes[msg.topic] ??= { above: 0, below: 0, open: null });
episode.above = score > threshold ? episode.above + 1 : 0;
episode.below = score < rules.clear_threshold ? episode.below + 1 : 0;
const raises = !episode.open && episode.above >= rules.raise_after;
if (raises) {
    episode.open = { machine: msg.topic, started_at: msg.end, score: 0, threshold };
    totals.raised += 1;
}
if (!episode.open) return null;
if (score > episode.open.score) {
    const severity = rules.severity.findLast((severity) => score >= severity.score).name;
    Object.assign(episode.open, { score, severity, input: contributions.indexOf(Math.max(...contributions)) });
}
const clears = episode.below >= rules.clear_after;
if (clears) {
    episode.open.ended_at = msg.end;
    episodes[msg.topic] = { above: 0, below: 0, open: null };
}
return raises || clears ? [{ topic: `${topic}/anomalies`, payload: { ...episode.open } }, null] : null;
