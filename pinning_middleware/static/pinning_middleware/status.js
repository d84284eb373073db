// Asks the page's own address every two seconds for what this process knows, and draws it. The
// user's cookies stay at home unless a proxy wants to see them: so looking on changes nothing.
"use strict";

const EVERY = 2000;
const MINUTE = 60000;
const SHORTEST = 20000;
const KEPT = 15 * MINUTE;
// Older knowledge is no point of a line.
const FRESH = 10;
const WIDTH = 640;
const HEIGHT = 200;
const SERIES = 5;
const PATIENCE = 30000;

const status = document.getElementById("status");
const svgNamespace = "http://www.w3.org/2000/svg";
// What earlier answers said: {at, lags: {key: seconds}, reads: {table: {key: number}}}.
const samples = [];
const keys = [];
let credentials = "omit";
let paused = false;
// The process whose figures these are, and when it was last met.
let pid = Number(document.getElementById("pid").textContent);
let met = 0;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(svgNamespace, name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  return made;
}

// Screen readers say what changes in a live region, so nothing is set that is there already.
function say(id, text) {
  const place = document.getElementById(id);
  if (place.textContent !== text) place.textContent = text;
}

function header(title, more) {
  const made = element("th", undefined, {role: "rowheader", scope: "row"});
  made.append(element("b", title));
  if (more) made.append(" ", element("span", more));
  return made;
}

function cell({label, text}) {
  const made = element("td", undefined, {role: "cell"});
  made.append(element("span", label, {class: "label", "aria-hidden": "true"}), " ");
  made.append(element("span", text, {class: "value"}));
  return made;
}

function row(cells, name = "") {
  const made = element("tr", undefined, {role: "row"});
  made.className = name;
  made.append(...cells);
  return made;
}

function fill(id, rows, width, none) {
  const body = document.querySelector(`#${id}-table tbody`);
  const empty = () => row([element("td", none, {role: "cell", colspan: width})]);
  body.replaceChildren(...(rows.length ? rows : [empty()]));
}

function showServers(servers) {
  fill("servers", servers.map((server) => row(
    [header(server.alias, server.address), ...server.cells.map(cell)],
    `${server.is_drained ? "drained" : server.state}${server.error ? " trouble" : ""}`,
  )), 9, "PINNING_REPLICAS names no replica.");
}

function keyOf({name, text}) {
  return `${name} ${text}`;
}

function lastMinute(table, now) {
  const before = samples.find((sample) => now - sample.at <= MINUTE + EVERY);
  return (share) => share.reads - ((before && before.reads[table][keyOf(share)]) || 0);
}

function showShares(table, shares, now) {
  const lately = lastMinute(table, now);
  const total = shares.reduce((sum, share) => sum + lately(share), 0);
  fill(table, shares.map((one) => {
    const {name, text, reads, percent} = one;
    const bar = drawn("svg", {class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true"});
    bar.append(drawn("rect", {width: percent, height: 10}));
    const share = element("td", undefined, {role: "cell"});
    share.append(bar, ` ${percent} %`);
    const number = lately(one);
    const percentLately = total ? ` (${Math.round((100 * number) / total)} %)` : "";
    return row([
      header(name, text),
      element("td", String(reads), {role: "cell"}),
      share,
      element("td", `${number}${percentLately}`, {role: "cell", class: "minute"}),
    ]);
  }), 4, "No read yet.");
}

function note(answer, now) {
  const lags = {};
  answer.servers.forEach((server) => {
    const known = server.lag !== null && server.age !== null && server.age < FRESH;
    const key = keyOf({name: server.alias, text: server.address});
    if (known) lags[key] = server.lag;
    if (known && !keys.includes(key)) keys.push(key);
  });
  const numbers = (shares) => Object.fromEntries(shares.map((one) => [keyOf(one), one.reads]));
  const reads = {"by-server": numbers(answer.by_server), "by-reason": numbers(answer.by_reason)};
  samples.push({at: now, lags, reads});
  while (now - samples[0].at > KEPT) samples.shift();
}

function ceiling(lag) {
  const steps = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 86400];
  return steps.find((step) => lag <= step) || lag;
}

function seconds(number) {
  return number < 120 ? `${Number(number.toFixed(1))} s` : `${Math.round(number / 60)} min`;
}

function lines(key, now, from, top) {
  const parts = [[]];
  samples.forEach((sample) => {
    const lag = sample.lags[key];
    if (lag === undefined) {
      if (parts.at(-1).length) parts.push([]);
      return;
    }
    const x = WIDTH * (1 - (now - sample.at) / from);
    const y = HEIGHT - 3 - (HEIGHT - 6) * Math.min(1, lag / top);
    parts.at(-1).push(`${x.toFixed(1)},${y.toFixed(1)}`);
  });
  return parts.filter((part) => part.length).map((part) => (
    part.length > 1 ? part : [part[0], part[0]]
  ));
}

function drawLag(now) {
  const from = Math.max(SHORTEST, now - samples[0].at);
  const top = ceiling(Math.max(0.1, ...samples.flatMap((sample) => Object.values(sample.lags))));
  const chart = document.getElementById("lag-chart");
  const grid = [0.25, 0.5, 0.75].map((part) => drawn("line", {
    x1: 0, x2: WIDTH, y1: HEIGHT * part, y2: HEIGHT * part,
  }));
  const curves = keys.flatMap((key, number) => lines(key, now, from, top).map((points) => (
    drawn("polyline", {points: points.join(" "), class: `series-${number % SERIES}`})
  )));
  chart.replaceChildren(...grid, ...curves);
  say("lag-top", seconds(top));
  say("lag-from", `${seconds(Math.round(from / 1000))} ago`);
  const last = samples.at(-1).lags;
  document.getElementById("lag-legend").replaceChildren(...keys.map((key, number) => {
    const item = element("li");
    const sample = drawn("svg", {viewBox: "0 0 32 10", "aria-hidden": "true"});
    sample.append(drawn("polyline", {points: "0,5 32,5", class: `series-${number % SERIES}`}));
    const now = last[key] === undefined ? "not measured now" : seconds(last[key]);
    item.append(sample, `${key.split(" ")[0]}: ${now}`);
    return item;
  }));
  say("lag-says", keys.length
    ? "Seconds behind the primary since this page was opened. It is measured while PINNING_MAX_LAG is set and reads come in."
    : "Not measured: it is while PINNING_MAX_LAG is set, or a block asks for it, and reads come in.");
}

function showSummary({state, text}) {
  say("summary", text);
  const name = `summary ${state}`;
  const summary = document.getElementById("summary");
  if (summary.className !== name) summary.className = name;
  document.title = `Replicas: ${state}`;
}

function show(answer, now) {
  note(answer, now);
  say("pid", String(answer.pid));
  showSummary(answer.summary);
  showServers(answer.servers);
  showShares("by-server", answer.by_server, now);
  showShares("by-reason", answer.by_reason, now);
  fill("events", answer.events.map((event) => row(event.cells.map(cell))), 5, "Nothing.");
  drawLag(now);
  say("live", "");
}

async function ask() {
  const headers = {"Pinning-Status": status.dataset.token};
  const response = await fetch(status.dataset.url, {credentials, headers, redirect: "error"});
  const isOurs = (response.headers.get("Content-Type") || "").startsWith("application/json");
  if (response.status === 403 && isOurs) {
    // An hour is over: whoever looks is asked for again.
    location.reload();
    return;
  }
  if (!response.ok || !isOurs) throw new Error(String(response.status));
  const answer = await response.json();
  const now = performance.now();
  if (answer.pid !== pid) {
    // Each process has figures of its own: stay with one, as long as it is there.
    if (now - met < PATIENCE) return;
    samples.length = keys.length = 0;
    pid = answer.pid;
  }
  met = now;
  show(answer, now);
}

async function look() {
  if (!paused && !document.hidden) {
    try {
      await ask();
    } catch {
      credentials = credentials === "omit" ? "same-origin" : "omit";
      say("live", "The site does not answer; trying again.");
    }
  }
  setTimeout(look, EVERY);
}

function begin() {
  const button = document.getElementById("pause");
  button.addEventListener("click", () => {
    paused = !paused;
    button.setAttribute("aria-pressed", String(paused));
  });
  ["pause", "live", "lag-section"].forEach((id) => { document.getElementById(id).hidden = false; });
  look();
}

begin();
