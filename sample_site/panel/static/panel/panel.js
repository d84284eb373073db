// The panel's controls, and a look at the replicas every second. Nothing here sends the site's
// cookies along, so that asking changes nothing for the person who looks.
"use strict";

const panel = document.getElementById("panel");

function secondsText(seconds) {
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min`;
}

function bytesText(bytes) {
  return bytes < 10000 ? `${bytes} bytes` : `${Math.round(bytes / 1024)} kB`;
}

function lagText(replica) {
  if (!replica.reachable) return "not reachable";
  if (replica.bytes_behind === null) return replica.paused ? "paused" : "position unknown";
  const state = replica.paused ? "paused, " : "";
  if (replica.bytes_behind === 0) return `${state}caught up`;
  return `${state}${bytesText(replica.bytes_behind)}, ${secondsText(replica.seconds_behind)} behind`;
}

function showReplica(replica) {
  const box = panel.querySelector(`.replica[data-alias="${replica.alias}"]`);
  if (!box) return;
  const [toggle, slider] = [box.querySelector(".toggle"), box.querySelector(".delay")];
  box.querySelector(".lag").value = lagText(replica);
  box.classList.toggle("behind", !replica.reachable || replica.bytes_behind > 0);
  box.classList.toggle("paused", replica.paused);
  toggle.disabled = slider.disabled = !replica.reachable;
  toggle.textContent = replica.paused ? "Resume" : "Pause";
  toggle.setAttribute("aria-label", `${toggle.textContent} ${replica.alias}`);
  if (document.activeElement !== slider) slider.value = replica.delay;
  showDelay(box);
}

function showDelay(box) {
  box.querySelector(".seconds").value = `${Number(box.querySelector(".delay").value)} s`;
}

function showAnswer(answer) {
  answer.replicas.forEach(showReplica);
}

function showProblem(text) {
  const problem = document.getElementById("problem");
  problem.textContent = text || "";
  problem.hidden = !text;
}

async function control(url, data = {}) {
  try {
    const response = await fetch(url, {
      method: "POST",
      credentials: "omit",
      headers: {"Sample-Panel": "1"},
      body: new URLSearchParams(data),
    });
    const answer = await response.json();
    showProblem(answer.error);
    showAnswer(answer);
  } catch {
    showProblem("The site does not answer.");
  }
}

async function look() {
  try {
    if (!document.hidden) {
      const response = await fetch(panel.dataset.status, {credentials: "omit"});
      showAnswer(await response.json());
    }
  } catch {
    panel.querySelectorAll(".lag").forEach((lag) => { lag.value = "the site does not answer"; });
  }
  setTimeout(look, 1000);
}

function countDown() {
  const countdown = panel.querySelector(".countdown");
  if (!countdown) return;
  const end = performance.now() + 1000 * Number(countdown.dataset.seconds);
  const timer = setInterval(() => {
    const left = Math.max(0, (end - performance.now()) / 1000);
    document.getElementById("pin-bar").value = left;
    document.getElementById("pin-left").textContent = left
      ? `at most ${Math.ceil(left)} s more`
      : "ended: the next page reads replicas again";
    if (!left) {
      document.getElementById("pin-badge").textContent = "not pinned";
      panel.querySelector(".pin").classList.remove("on");
      clearInterval(timer);
    }
  }, 250);
}

function showMissing() {
  const missing = document.getElementById("missing");
  const wanted = /^#message-\d+$/.test(location.hash) && location.hash.slice(1);
  if (missing && wanted) missing.hidden = document.getElementById(wanted) !== null;
}

function begin() {
  document.getElementById("pinning").addEventListener("change", (event) => {
    const age = event.target.checked ? 0 : 86400;
    document.cookie = `${panel.dataset.offCookie}=1; path=/; max-age=${age}; samesite=lax`;
    location.reload();
  });
  panel.querySelectorAll(".replica").forEach((box) => {
    box.querySelector(".toggle").addEventListener("click", () => {
      control(box.classList.contains("paused") ? box.dataset.resume : box.dataset.pause);
    });
    box.querySelector(".delay").addEventListener("input", () => showDelay(box));
    box.querySelector(".delay").addEventListener("change", (event) => {
      control(box.dataset.delay, {seconds: event.target.value});
    });
  });
  window.addEventListener("hashchange", showMissing);
  showMissing();
  countDown();
  look();
}

if (panel) begin();
