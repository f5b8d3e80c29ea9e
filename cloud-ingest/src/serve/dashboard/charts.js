"use strict";
// Charts as SVG: a line with a band, shaded stretches, axes with round numbers, and a cursor that reads values.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Numbers with four significant digits, as an instrument shows them.
function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.001 || size === 0 ? 3 : 6;
  return value.toLocaleString("en-GB", { maximumFractionDigits: digits, minimumFractionDigits: Math.min(digits, 2) });
}

// Round steps of 1, 2 or 5 times a power of ten, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= raw);
  const out = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) out.push(Number(at.toPrecision(12)));
  return out;
}

function timeTicks(from, to, count) {
  const minute = 60e3, hour = 60 * minute;
  const steps = [10 * minute, 30 * minute, hour, 2 * hour, 3 * hour, 6 * hour, 12 * hour, 24 * hour];
  const step = steps.find(s => (to - from) / s <= count) || 24 * hour;
  const zone = new Date(from).getTimezoneOffset() * minute;
  const out = [];
  for (let at = Math.ceil((from - zone) / step) * step + zone; at <= to; at += step) out.push(at);
  return out;
}

const clockTime = at => new Date(at).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
const dayTime = at => new Date(at).toLocaleString("en-GB", { weekday: "short", hour: "2-digit", minute: "2-digit" });

// `points`: [{at, mean, min, max}] in order of time; a stretch longer than `gap` ms without a point is a gap.
// `shades`: [{from, to, label}]. Nothing is drawn over a gap: what was not measured is not shown.
function chart(place, { points, shades = [], from, to, gap, unit, label }) {
  const shown = points.filter(p => p.mean !== null && p.at >= from && p.at <= to);
  place.replaceChildren();
  if (!shown.length) {
    const empty = document.createElement("p");
    empty.className = "empty";
    empty.textContent = "No data in this period.";
    place.append(empty);
    return;
  }
  const width = Math.max(place.clientWidth, 240), height = Math.max(place.clientHeight, 120);
  const margin = { top: 8, right: 10, bottom: 22, left: 52 };
  let low = Math.min(...shown.map(p => p.min ?? p.mean)), high = Math.max(...shown.map(p => p.max ?? p.mean));
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.02 || 1;
  low -= pad; high += pad;
  const x = at => margin.left + (at - from) / (to - from) * (width - margin.left - margin.right);
  const y = value => height - margin.bottom - (value - low) / (high - low) * (height - margin.top - margin.bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });

  for (const value of ticks(low, high, Math.max(3, Math.round(height / 40)))) {
    root.append(svg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { class: "axis", x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toLocaleString("en-GB", { maximumFractionDigits: 6 })));
  }
  for (const at of timeTicks(from, to, Math.max(3, Math.floor(width / 95)))) {
    const midnight = new Date(at).getHours() === 0 && new Date(at).getMinutes() === 0;
    const text = midnight ? new Date(at).toLocaleDateString("en-GB", { day: "numeric", month: "short" }) : clockTime(at);
    root.append(svg("text", { class: "axis", x: x(at), y: height - 6, "text-anchor": "middle" }, text));
  }
  for (const shade of shades) {
    const start = Math.max(shade.from, from), end = Math.min(shade.to ?? to, to);
    if (end <= start) continue;
    const area = svg("rect", { class: "shade", x: x(start), y: margin.top, width: Math.max(x(end) - x(start), 2), height: height - margin.top - margin.bottom });
    area.append(svg("title", {}, shade.label));
    root.append(area, svg("line", { class: "edge", x1: x(start), x2: x(start), y1: margin.top, y2: height - margin.bottom }));
  }
  for (const run of runs(shown, gap)) {
    if (run.length === 1) {
      const [p] = run;
      root.append(svg("line", { class: "line", x1: x(p.at), x2: x(p.at), y1: y(p.min ?? p.mean), y2: y(p.max ?? p.mean) }));
      root.append(svg("circle", { class: "point", cx: x(p.at), cy: y(p.mean), r: 2.2 }));
      continue;
    }
    const path = (list, of) => list.map(p => `${x(p.at).toFixed(1)},${y(of(p)).toFixed(1)}`).join("L");
    if (run.some(p => p.min !== undefined)) {
      const back = [...run].reverse();
      root.append(svg("path", { class: "band", d: `M${path(run, p => p.max ?? p.mean)}L${path(back, p => p.min ?? p.mean)}Z` }));
    }
    root.append(svg("path", { class: "line", d: `M${path(run, p => p.mean)}` }));
  }
  place.append(root);
  readable(place, root, { shown, x, from, to, width, height, margin, unit });
}

function runs(points, gap) {
  const out = [];
  for (const p of points) {
    const last = out.at(-1);
    if (last && p.at - last.at(-1).at <= gap) last.push(p); else out.push([p]);
  }
  return out;
}

// A cursor that follows the pointer and tells the nearest point's values.
function readable(place, root, { shown, x, from, to, width, height, margin, unit }) {
  const cursor = svg("line", { class: "cursor", y1: margin.top, y2: height - margin.bottom, visibility: "hidden" });
  root.append(cursor);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  place.append(tip);
  root.addEventListener("pointermove", event => {
    const box = root.getBoundingClientRect();
    const at = from + ((event.clientX - box.left) / box.width * width - margin.left) / (width - margin.left - margin.right) * (to - from);
    const p = shown.reduce((best, q) => Math.abs(q.at - at) < Math.abs(best.at - at) ? q : best);
    cursor.setAttribute("x1", x(p.at)); cursor.setAttribute("x2", x(p.at)); cursor.setAttribute("visibility", "visible");
    const lines = [["b", `${figure(p.mean)} ${unit}`], ["span", dayTime(p.at)]];
    if (p.min !== undefined && p.min !== null) lines.splice(1, 0, ["span", `${figure(p.min)} to ${figure(p.max)}`]);
    tip.replaceChildren(...lines.map(([kind, text]) => Object.assign(document.createElement(kind), { textContent: text })));
    tip.hidden = false;
    const left = x(p.at) / width * box.width;
    tip.style.left = left > box.width / 2 ? "" : `${left + 10}px`;
    tip.style.right = left > box.width / 2 ? `${box.width - left + 10}px` : "";
  });
  root.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
}

// The course of the last minutes; where nothing was measured the line is broken.
function sparkline(values) {
  const root = svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" });
  const known = values.filter(v => v !== null);
  if (known.length < 2) return root;
  const low = Math.min(...known), span = Math.max(...known) - low || 1;
  let path = "", pen = false;
  values.forEach((value, i) => {
    if (value === null) { pen = false; return; }
    path += `${pen ? "L" : "M"}${(i / (values.length - 1) * 100).toFixed(1)},${(22 - (value - low) / span * 20).toFixed(1)}`;
    pen = true;
  });
  root.append(svg("path", { d: path }));
  return root;
}
