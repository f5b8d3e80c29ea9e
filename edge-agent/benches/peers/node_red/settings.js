/**
 * Node-RED's settings for the edge agent's job. Its flow is flow.json, in which "func": "NAME.js" stands for that
 * file: what is above its line of dashes is the function node's On Start, what is below its On Message. run.py puts
 * them together; JOB names the file that says what is to be done.
 *
 * Written to be as fast as such a flow honestly gets: one chain of nodes, so that no message is ever cloned; a
 * message a row of all devices, not one a reading; all machines scored by one call of the network a second; one
 * MQTT message a second. JSON in the form that the job says (job.py).
 *
 * node_red_usual/ is the same job as such flows are usually built, from the palette's own nodes as far as they go: csv
 * and split make a message of every reading, function nodes keep what they know of each device in their context, and
 * three branches (readings, windows, scores) each get a copy. It takes these settings, too.
 *
 * It does no more than the job: no late or doubled rows, no durable queue, no account of what it did but the totals
 * that it publishes last. The editor and the admin API are off, as on a gateway.
 */
module.exports = {
    userDir: __dirname,
    flowFile: "flows.json",
    disableEditor: true,
    httpAdminRoot: false,
    httpNodeRoot: false,
    uiHost: "127.0.0.1",
    uiPort: Number(process.env.HTTP_PORT),
    logging: { console: { level: "warn", metrics: false, audit: false } },
    functionGlobalContext: {
        job: JSON.parse(require("fs").readFileSync(process.env.JOB)),
        ort: require("onnxruntime-node"),
    },
};
