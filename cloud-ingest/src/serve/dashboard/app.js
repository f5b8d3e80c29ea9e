"use strict";
// One answer every two seconds feeds the whole page; the charts ask by SQL when a device is chosen and then now
// and again. Nothing is asked while the page is hidden. Text enters the page as text, never as markup.

const POLL = 2000, MINUTES_EVERY = 10000, HOURS_EVERY = 60000;
const HOUR = 3600e3;
const $ = id => document.getElementById(id);
let overview = null;      // the last answer
let chosen = null;        // {site, device_id} of the charts
let failing = null;       // since when the server does not answer
const history = { hours: [], minutes: [], hoursAt: 0, minutesAt: 0 };

function element(name, { text, className, ...rest } = {}, ...children) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  for (const [key, value] of Object.entries(rest)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const UNITS = { Cel: "°C", "m/s2": "m/s²", "[degF]": "°F", Ohm: "Ω", deg: "°" };
const unitText = unit => UNITS[unit] ?? (unit === "1" ? "" : (unit || "").replace(/m3/g, "m³").replace(/m2/g, "m²"));
const count = n => Number(n ?? 0).toLocaleString("en-GB");
const time = text => Date.parse(text);
const now = () => time(overview.now);
const at = text => dayTime(time(text));
// Devices are named after their machine: within its card the rest is enough.
const shortName = device => device.device_id.startsWith(`${device.asset_id}/`) ? device.device_id.slice(device.asset_id.length + 1) : device.device_id;

function span(ms) {
  const minutes = Math.round(Math.abs(ms) / 60e3);
  if (minutes < 1) return `${Math.round(Math.abs(ms) / 1e3)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

function bytes(n) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${n.toLocaleString("en-GB", { maximumFractionDigits: i ? 1 : 0 })} ${units[i]}`;
}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(20000) });
  const text = await response.text();
  const answer = text ? JSON.parse(text) : null;
  if (!response.ok) throw new Error(answer?.error?.message ?? `${response.status}`);
  return answer;
}

const quoted = text => `'${String(text).replaceAll("'", "''")}'`;

// Keeps the nodes of a list, so that focus and pointers stay where they are while values change.
function keyed(parent, items, key, make, update) {
  const known = new Map([...parent.children].map(node => [node.dataset.key, node]));
  items.forEach((item, i) => {
    const id = key(item);
    let node = known.get(id);
    if (!node) { node = make(item); node.dataset.key = id; }
    known.delete(id);
    update(node, item);
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null);
  });
  known.forEach(node => node.remove());
}

function showState() {
  const open = overview.anomalies.filter(e => !e.ended_at);
  const silent = overview.gateways.filter(g => g.unknown_since);
  let kind = "good", text = "Running";
  if (failing) {
    [kind, text] = ["unknown", `No answer from the server since ${clockTime(failing)}`];
  } else if (open.length) {
    const where = [...new Set(open.map(e => e.asset_id ?? e.device_id))].join(", ");
    [kind, text] = ["bad", `${open.length === 1 ? "Anomaly" : `${open.length} anomalies`} on ${where}`];
  } else if (silent.length) {
    [kind, text] = ["warn", silent.length === 1 ? `${silent[0].gateway_id} unknown since ${clockTime(time(silent[0].unknown_since))}` : `${silent.length} gateways unknown`];
  } else if (!overview.gateways.length) {
    [kind, text] = ["unknown", "Waiting for the first gateway"];
  }
  $("state").className = `state ${kind}`;
  $("state-text").textContent = text;
  const sites = [...new Set(overview.assets.map(a => a.site))].join(", ");
  $("clock").textContent = `${sites ? `${sites} · ` : ""}${new Date(now()).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" })}`;
  document.title = kind === "good" ? "Tailrace" : `${text} · Tailrace`;
}

const OUTCOMES = [
  ["stored", "stored"], ["held", "held back"], ["rejected", "rejected"], ["skipped", "skipped"],
  ["quarantined", "quarantined"], ["declared", "declared lost"], ["pending", "on the way"],
];

function showLedger() {
  const ledger = overview.ledger;
  const box = $("ledger");
  if (!ledger) {
    box.className = "ledger";
    $("verdict").textContent = "No ledger yet";
    $("missing").textContent = "–";
    return;
  }
  const missing = Number(ledger.missing ?? 0);
  box.className = `ledger ${missing ? "lost" : "ok"}`;
  $("verdict").textContent = missing ? "Readings are missing" : "Every reading accounted for";
  $("missing").textContent = count(missing);
  const term = (value, name) => element("span", { className: Number(value) ? "term" : "term zero" }, element("b", { text: count(value) }), element("span", { text: name }));
  const sign = text => element("span", { text, className: "sign" });
  // A sign stays with the term it stands before, also where the line breaks.
  const signed = (text, node) => element("span", { className: "signed" }, sign(text), node);
  const parts = [term(ledger.polled, "polled"), ...OUTCOMES.map(([key, name], i) => signed(i ? "+" : "=", term(ledger[key], name)))];
  $("equation").replaceChildren(...parts);
  const bar = [...OUTCOMES.map(([key]) => [key, Number(ledger[key] ?? 0)]), ["lost", missing]].filter(([, n]) => n > 0);
  $("ledger-bar").replaceChildren(...bar.map(([key, n]) => {
    const part = element("i", { className: key, title: `${key}: ${count(n)}` });
    part.style.flexGrow = n;
    return part;
  }));
  $("ledger-bar").setAttribute("aria-label", `Of ${count(ledger.polled)} readings polled: ${bar.map(([key, n]) => `${count(n)} ${key}`).join(", ")}`);
}

function showNotice() {
  const lines = overview.gateways.filter(g => g.unknown_since).map(g =>
    `${g.gateway_id} (${g.site}): unknown since ${at(g.unknown_since)}. What it reads meanwhile is counted when it is heard again.`);
  lines.push(...overview.problems);
  $("notice").hidden = !lines.length;
  $("notice").textContent = lines.join(" ");
}

function isStale(device) {
  return !device.ts || now() - time(device.ts) > Math.max(3 * (device.interval ?? 0) * 1000, 60e3);
}

function makeDevice(device) {
  const row = element("button", { className: "device", type: "button", "aria-pressed": "false" },
    element("span", { className: "name", text: shortName(device), title: device.device_id }), element("span"), element("span", { className: "value" }));
  row.addEventListener("click", () => {
    choose(device);
    $("device").scrollIntoView({ block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  });
  return row;
}

function updateDevice(row, device) {
  const stale = isStale(device);
  row.classList.toggle("stale", stale);
  row.setAttribute("aria-pressed", String(chosen !== null && chosen.device_id === device.device_id && chosen.site === device.site));
  row.children[1].replaceChildren(sparkline(device.course ?? []));
  const value = row.children[2];
  value.replaceChildren(`${figure(device.value)} `, element("small", { text: unitText(device.unit) }));
  const mark = (text, kind) => value.append(element("span", { text, className: `mark ${kind}` }));
  if (!device.ts) mark("no reading yet", "unknown");
  else if (stale) mark(`${span(now() - time(device.ts))} ago`, "unknown");
  else if (device.quality === "bad") mark("bad", "bad");
  else if (device.quality === "uncertain") mark("uncertain", "warn");
}

function showPlant() {
  if (!overview.assets.length) return;
  const place = $("plant");
  place.querySelector(":scope > .empty")?.remove();
  keyed(place, overview.assets, a => `${a.site}/${a.asset_id}`,
    asset => element("article", { className: "card" },
      element("div", { className: "card-head" }, element("h3", { text: asset.asset_id || "no asset" }), element("span", { className: "path", text: asset.path ?? "" }), element("span", { className: "tag" })),
      element("div", { className: "devices" })),
    (card, asset) => {
      const open = overview.anomalies.filter(e => !e.ended_at && e.site === asset.site && e.asset_id === asset.asset_id);
      const devices = asset.devices ?? [];
      const [kind, text] = open.length ? ["bad", `anomaly for ${span(now() - time(open[0].started_at))}`]
        : !devices.length || devices.every(isStale) ? ["unknown", "no live values"] : ["good", "normal"];
      card.className = `card${open.length ? " alarm" : ""}`;
      const tag = card.querySelector(".tag");
      tag.className = `tag ${kind}`;
      tag.textContent = text;
      keyed(card.querySelector(".devices"), devices, d => d.device_id, makeDevice, updateDevice);
    });
}

function showDevices() {
  const devices = overview.assets.flatMap(a => a.devices ?? []);
  const select = $("device");
  const names = devices.map(d => JSON.stringify([d.site, d.device_id]));
  if (names.join() !== [...select.options].map(o => o.value).join()) {
    select.replaceChildren(...devices.map((d, i) => element("option", { value: names[i], text: d.device_id })));
  }
  if (!chosen && devices.length) {
    const open = overview.anomalies.find(e => !e.ended_at);
    choose(devices.find(d => open && d.device_id === open.device_id) ?? devices[0]);
  }
  if (chosen) select.value = JSON.stringify([chosen.site, chosen.device_id]);
}

function showAnomalies() {
  const items = overview.anomalies.map(e => {
    const lasted = span((e.ended_at ? time(e.ended_at) : now()) - time(e.started_at));
    return element("li", {}, element("span", { className: "what", text: e.device_id || e.asset_id }),
      element("span", { className: `tag ${e.ended_at ? "unknown" : "bad"}`, text: e.ended_at ? `lasted ${lasted}` : `open for ${lasted}` }),
      element("span", { className: "detail", text: `${at(e.started_at)} · ${e.model} · score ${figure(e.score)}, threshold ${figure(e.threshold)} · ${e.severity}` }));
  });
  $("anomalies").replaceChildren(...(items.length ? items : [element("li", { className: "empty", text: "None so far." })]));
}

function showMaintenance() {
  const place = $("maintenance");
  if (!overview.maintenance.length) {
    place.replaceChildren(element("li", { className: "empty", text: "Nothing is scheduled." }));
    return;
  }
  place.querySelector(":scope > .empty")?.remove();
  keyed(place, overview.maintenance, m => `${m.site}/${m.asset_id}/${m.action}`, item => {
    const done = element("button", { type: "button", text: "Record as done", "aria-label": `Record as done: ${item.action} of ${item.asset_id}` });
    done.addEventListener("click", async () => {
      if (!confirm(`Record that "${item.action}" was done on ${item.asset_id} now?`)) return;
      done.disabled = true;
      try {
        await ask("api/v1/maintenance", { asset: item.asset_id, site: item.site, action: item.action });
        done.textContent = "Recorded";
      } catch (error) {
        done.disabled = false;
        alert(`Not recorded: ${error.message}`);
      }
    });
    return element("li", {}, element("span", { className: "what" }), element("span"), element("span", { className: "detail" }), element("span", { className: "detail" }, done));
  }, (row, item) => {
    const left = item.due_by ? time(item.due_by) - now() : null;
    const [kind, text] = left === null ? ["unknown", "no date"] : left < 0 ? ["bad", `overdue by ${span(left)}`]
      : left < 14 * 24 * HOUR ? ["warn", `due in ${span(left)}`] : ["good", `due in ${span(left)}`];
    row.children[0].textContent = `${item.asset_id}: ${item.action}`;
    row.children[1].className = `tag ${kind}`;
    row.children[1].textContent = text;
    const hours = item.running_hours === null ? "" : ` · ${count(Math.round(item.running_hours))} running hours`;
    row.children[2].textContent = `${item.reason}${hours}`;
  });
}

function showGateways() {
  const items = overview.gateways.map(g => {
    const [kind, text] = g.unknown_since ? ["warn", `unknown since ${at(g.unknown_since)}`] : ["good", "online"];
    const outbox = g.outbox === null ? "" : g.outbox === 0 ? " · outbox empty" : ` · ${count(g.outbox)} messages in the outbox`;
    return element("li", {}, element("span", { className: "what", text: g.gateway_id }), element("span", { className: `tag ${kind}`, text }),
      element("span", { className: "detail", text: `${g.site} · heard ${span(now() - time(g.last_heard))} ago${outbox}${g.version ? ` · release ${g.version}` : ""}` }));
  });
  $("gateways").replaceChildren(...(items.length ? items : [element("li", { className: "empty", text: "None has reported yet." })]));
}

function showLayers() {
  const rows = (overview.layers ?? []).map(layer => {
    const [schema, ...name] = layer.name.split("/");
    return element("tr", {}, element("td", {}, element("span", { className: `layer ${schema}`, text: schema }), ` ${name.join("/")}`),
      element("td", { text: count(layer.rows) }), element("td", { text: count(layer.files) }), element("td", { text: bytes(layer.bytes) }));
  });
  $("layers").tBodies[0].replaceChildren(...rows);
}

function choose(device) {
  chosen = { site: device.site, device_id: device.device_id, asset_id: device.asset_id, unit: device.unit };
  Object.assign(history, { hours: [], minutes: [], hoursAt: 0, minutesAt: 0 });
  document.querySelectorAll(".device").forEach(row => row.setAttribute("aria-pressed", String(row.dataset.key === device.device_id)));
  loadHistory();
}

async function series(table, column, hours, device) {
  const since = new Date(now() - hours * HOUR).toISOString();
  const sql = `SELECT ${column} AS at, mean, min, max FROM ${table} WHERE site = ${quoted(device.site)} AND device_id = ${quoted(device.device_id)} AND ${column} >= TIMESTAMP ${quoted(since)} ORDER BY ${column}`;
  const answer = await ask("api/v1/sql", { sql });
  return answer.rows.map(([when, mean, min, max]) => ({ at: time(when), mean, min, max }));
}

async function loadHistory() {
  if (!chosen || !overview) return;
  const device = chosen, tick = Date.now();
  const wanted = [];
  if (tick - history.hoursAt > HOURS_EVERY) { history.hoursAt = tick; wanted.push(series("gold.hourly_aggregates", "hour", 48, device).then(points => ["hours", points])); }
  if (tick - history.minutesAt > MINUTES_EVERY) { history.minutesAt = tick; wanted.push(series("gold.timeseries_1m", "time", 6, device).then(points => ["minutes", points])); }
  for (const done of await Promise.allSettled(wanted)) {
    // Another device may have been chosen in the meantime.
    if (done.status === "fulfilled" && device === chosen) history[done.value[0]] = done.value[1];
  }
  if (wanted.length && device === chosen) drawCharts();
}

function drawCharts() {
  if (!chosen || !overview) return;
  const unit = unitText(chosen.unit);
  const shades = overview.anomalies.filter(e => e.device_id === chosen.device_id || e.asset_id === chosen.asset_id)
    .map(e => ({ from: time(e.started_at), to: e.ended_at ? time(e.ended_at) : null, label: `${e.model}, score ${figure(e.score)}` }));
  const first = points => points.find(p => p.mean !== null)?.at ?? now();
  const hoursFrom = Math.min(Math.max(first(history.hours), now() - 48 * HOUR), now() - 6 * HOUR);
  chart($("hourly"), { points: history.hours, shades, from: hoursFrom, to: now(), gap: 1.5 * HOUR, unit, label: `Hourly mean, minimum and maximum of ${chosen.device_id}` });
  const minutesFrom = Math.min(Math.max(first(history.minutes), now() - 6 * HOUR), now() - HOUR);
  chart($("minutes"), { points: history.minutes, shades, from: minutesFrom, to: now(), gap: 5 * 60e3, unit, label: `Mean by the minute of ${chosen.device_id}` });
}

async function refresh() {
  try {
    overview = await ask("api/v1/overview");
    failing = null;
  } catch {
    failing ??= Date.now();
    if (!overview) {
      $("state").className = "state unknown";
      $("state-text").textContent = `No answer from the server since ${clockTime(failing)}`;
      return;
    }
  }
  showState();
  if (failing) return;
  showLedger(); showNotice(); showPlant(); showDevices(); showAnomalies(); showMaintenance(); showGateways(); showLayers();
  loadHistory();
}

async function showDemo() {
  const demo = await ask("api/v1/demo").catch(() => ({ available: false, buttons: [] }));
  $("demo").hidden = !demo.available;
  $("buttons").replaceChildren(...demo.buttons.map(({ key, label }) => {
    const button = element("button", { type: "button", text: label.charAt(0).toUpperCase() + label.slice(1), className: key === "r" ? "repair" : "" });
    button.addEventListener("click", async () => {
      const done = await ask("api/v1/demo", { key }).then(() => `${label}: done at ${new Date().toLocaleTimeString("en-GB")}`, error => `${label}: ${error.message}`);
      $("pressed").textContent = done;
    });
    return button;
  }));
}

async function loop() {
  if (!document.hidden) await refresh();
  setTimeout(loop, POLL);
}

$("device").addEventListener("change", event => {
  const [site, id] = JSON.parse(event.target.value);
  const device = overview.assets.flatMap(a => a.devices ?? []).find(d => d.site === site && d.device_id === id);
  if (device) choose(device);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
let resized;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawCharts, 120); });
showDemo();
loop();
