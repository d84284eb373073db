// Polls the page's data URL every two seconds and renders the response. Requests omit the user's
// cookies, so that an open page keeps no session alive, unless a proxy requires them.
"use strict";

const POLL_INTERVAL = 2000;
const MINUTE = 60000;
const MIN_CHART_SPAN = 20000;
const CHART_SPAN = 15 * MINUTE;
// Maximum age of a lag that is drawn (seconds).
const MAX_LAG_AGE = 10;
const WIDTH = 640;
const HEIGHT = 200;
const SERIES = 5;
const PROCESS_TIMEOUT = 30000;

const status = document.getElementById("status");
const svgNamespace = "http://www.w3.org/2000/svg";
// Earlier responses: {at, lags: {key: seconds}, reads: {table: {key: number}}}.
const samples = [];
const keys = [];
let credentials = "omit";
let paused = false;
// The process whose state is shown, and the time of its last response.
let pid = Number(document.getElementById("pid").textContent);
let lastResponse = 0;

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

// Screen readers announce every change of a live region, so do not set an unchanged text.
function setText(id, text) {
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
    `${server.is_drained ? "drained" : server.state}${server.error ? " faulty" : ""}`,
  )), 9, "PINNING_REPLICAS is empty.");
}

function keyOf({name, text}) {
  return `${name} ${text}`;
}

function readsInLastMinute(table, now) {
  const before = samples.find((sample) => now - sample.at <= MINUTE + POLL_INTERVAL);
  return (share) => share.reads - ((before && before.reads[table][keyOf(share)]) || 0);
}

function showShares(table, shares, now) {
  const recentReads = readsInLastMinute(table, now);
  const total = shares.reduce((sum, share) => sum + recentReads(share), 0);
  fill(table, shares.map((one) => {
    const {name, text, reads, percent} = one;
    const bar = drawn("svg", {class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true"});
    bar.append(drawn("rect", {width: percent, height: 10}));
    const share = element("td", undefined, {role: "cell"});
    share.append(bar, ` ${percent} %`);
    const number = recentReads(one);
    const percentLately = total ? ` (${Math.round((100 * number) / total)} %)` : "";
    return row([
      header(name, text),
      element("td", String(reads), {role: "cell"}),
      share,
      element("td", `${number}${percentLately}`, {role: "cell", class: "minute"}),
    ]);
  }), 4, "No reads yet.");
}

function addSample(answer, now) {
  const lags = {};
  answer.servers.forEach((server) => {
    const isFresh = server.lag !== null && server.age !== null && server.age < MAX_LAG_AGE;
    const key = keyOf({name: server.alias, text: server.address});
    if (isFresh) lags[key] = server.lag;
    if (isFresh && !keys.includes(key)) keys.push(key);
  });
  const numbers = (shares) => Object.fromEntries(shares.map((one) => [keyOf(one), one.reads]));
  const reads = {"by-server": numbers(answer.by_server), "by-reason": numbers(answer.by_reason)};
  samples.push({at: now, lags, reads});
  while (now - samples[0].at > CHART_SPAN) samples.shift();
}

function chartTop(lag) {
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
  const from = Math.max(MIN_CHART_SPAN, now - samples[0].at);
  const top = chartTop(Math.max(0.1, ...samples.flatMap((sample) => Object.values(sample.lags))));
  const chart = document.getElementById("lag-chart");
  const grid = [0.25, 0.5, 0.75].map((part) => drawn("line", {
    x1: 0, x2: WIDTH, y1: HEIGHT * part, y2: HEIGHT * part,
  }));
  const curves = keys.flatMap((key, number) => lines(key, now, from, top).map((points) => (
    drawn("polyline", {points: points.join(" "), class: `series-${number % SERIES}`})
  )));
  chart.replaceChildren(...grid, ...curves);
  setText("lag-top", seconds(top));
  setText("lag-from", `${seconds(Math.round(from / 1000))} ago`);
  const last = samples.at(-1).lags;
  document.getElementById("lag-legend").replaceChildren(...keys.map((key, number) => {
    const item = element("li");
    const sample = drawn("svg", {viewBox: "0 0 32 10", "aria-hidden": "true"});
    sample.append(drawn("polyline", {points: "0,5 32,5", class: `series-${number % SERIES}`}));
    const now = last[key] === undefined ? "currently unknown" : seconds(last[key]);
    item.append(sample, `${key.split(" ")[0]}: ${now}`);
    return item;
  }));
  setText("lag-description", keys.length
    ? "Seconds behind the primary since this page was opened. Measured while PINNING_MAX_LAG is set and reads arrive."
    : "Not measured. Lag is measured while PINNING_MAX_LAG is set, or use_replica(max_lag=…) is used, and reads arrive.");
}

function showSummary({state, text}) {
  setText("summary", text);
  const name = `summary ${state}`;
  const summary = document.getElementById("summary");
  if (summary.className !== name) summary.className = name;
  document.title = `Replicas: ${state}`;
}

function show(answer, now) {
  addSample(answer, now);
  setText("pid", String(answer.pid));
  showSummary(answer.summary);
  showServers(answer.servers);
  showShares("by-server", answer.by_server, now);
  showShares("by-reason", answer.by_reason, now);
  fill("events", answer.events.map((event) => row(event.cells.map(cell))), 5, "No events.");
  setText("dry-run-text", answer.dry_run);
  drawLag(now);
  setText("live", "");
}

async function poll() {
  const headers = {"Pinning-Status": status.dataset.token};
  const response = await fetch(status.dataset.url, {credentials, headers, redirect: "error"});
  const isJson = (response.headers.get("Content-Type") || "").startsWith("application/json");
  if (response.status === 403 && isJson) {
    // The token has expired; reloading the page checks the user again.
    location.reload();
    return;
  }
  if (!response.ok || !isJson) throw new Error(String(response.status));
  const answer = await response.json();
  const now = performance.now();
  if (answer.pid !== pid) {
    // Each process has its own counters: stay with one as long as it responds.
    if (now - lastResponse < PROCESS_TIMEOUT) return;
    samples.length = keys.length = 0;
    pid = answer.pid;
  }
  lastResponse = now;
  show(answer, now);
}

async function pollRepeatedly() {
  if (!paused && !document.hidden) {
    try {
      await poll();
    } catch {
      credentials = credentials === "omit" ? "same-origin" : "omit";
      setText("live", "The site does not respond; retrying.");
    }
  }
  setTimeout(pollRepeatedly, POLL_INTERVAL);
}

function start() {
  const button = document.getElementById("pause");
  button.addEventListener("click", () => {
    paused = !paused;
    button.setAttribute("aria-pressed", String(paused));
  });
  ["pause", "live", "lag-section"].forEach((id) => { document.getElementById(id).hidden = false; });
  pollRepeatedly();
}

start();
