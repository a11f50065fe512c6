// The page itself: what was chosen, asking the server for it, and saying how things stand.
"use strict";

(() => {
  const at = (id) => document.getElementById(id);
  const token = new URLSearchParams(location.search).get("token");
  const { number, list } = streamlensRuns;

  // -- what was chosen: in the address, so that it outlives a reload and can be handed on ----------

  const wanted = (() => {
    const said = new URLSearchParams(location.hash.slice(1));
    return {
      runs: said.getAll("run"),
      layers: said.get("layers") ?? "",
      row: said.get("row"),
      model: said.get("model") ?? "",
      after: said.get("after"),
    };
  })();
  let window_ = null; // the steps to look at closely

  function remember() {
    const said = new URLSearchParams(wanted.runs.map((key) => ["run", key]));
    for (const name of ["layers", "row", "model", "after"]) if (wanted[name]) said.set(name, wanted[name]);
    const text = said.toString();
    history.replaceState(null, "", `${location.pathname}${location.search}${text ? `#${text}` : ""}`);
  }

  // -- asking ---------------------------------------------------------------------------------------

  const known = new Map(); // by address: the tag of what came last
  let ending = false;

  async function ask(address, signal) {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    if (known.get(address.split("?")[0])?.address === address) headers["If-None-Match"] = known.get(address.split("?")[0]).tag;
    const answer = await fetch(address, { headers, signal, cache: "no-store" });
    const wait = Number(answer.headers.get("streamlens-wait") ?? 1);
    ending = answer.headers.get("streamlens-ending") === "1";
    if (answer.status === 304) return { content: null, wait };
    if (!answer.ok) {
      const error = new Error(answer.status === 400 ? (await answer.json()).error : `the server answered ${answer.status}`);
      error.refused = answer.status < 500;
      throw error;
    }
    known.set(address.split("?")[0], { address, tag: answer.headers.get("etag") });
    return { content: await answer.json(), wait };
  }

  function question() {
    const said = new URLSearchParams(wanted.runs.map((key) => ["run", key]));
    if (wanted.layers.trim()) said.set("layers", wanted.layers);
    if (wanted.row !== null) {
      said.set("row", wanted.row);
      if (wanted.model) said.set("model", wanted.model);
    }
    if (window_) {
      said.set("from", window_[0]);
      said.set("to", window_[1]);
    }
    return `api/charts?${said}`;
  }

  // -- showing --------------------------------------------------------------------------------------

  let shown = null; // the answer on the screen
  const board = streamlensCharts.board({
    onZoom: (range) => {
      sayRange(range);
      lookClosely(range);
    },
    onClick: (chart, datum) => {
      if (typeof datum.layer === "string" && "end" in datum && "last" in datum) openRow(datum.layer, chart.model, chart.id);
    },
  });
  globalThis.streamlensBoard = board;

  const runs = list({
    onChoose: (keys) => {
      wanted.runs = keys;
      wanted.row = wanted.after = null;
      wholeRun();
      changed();
    },
  });

  function openRow(row, model, after) {
    Object.assign(wanted, { row, model, after });
    changed();
  }

  function closeRow() {
    const card = [...document.querySelectorAll("section.card")].find(({ dataset }) => dataset.id === wanted.after);
    openRow(null, "", null);
    (card ?? at("layer")).scrollIntoView({ block: "nearest" });
    at("layer").focus({ preventScroll: true });
  }

  async function show(content) {
    const fresh = shown?.detail?.row !== content.detail?.row && content.detail;
    shown = content;
    const charts = streamlensShown.show(content, { ...wanted, close: closeRow, onSee: see });
    runs.shown(content.runs);
    sayRange(board.range);
    await board.show(charts, content.configs);
    document.documentElement.dataset.drawn = charts.length;
    document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates ?? 0) + 1;
    if (fresh) document.querySelector("[data-detail]")?.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  function say(state, text) {
    const status = at("status");
    if (status.textContent !== text) status.textContent = text;
    status.className = `status ${state}`;
  }

  function sayHow() {
    const live = shown && runs.liveAmong(shown.runs);
    if (ending) say("", "the training has ended; the charts stay as they are");
    else say(live ? "recording" : "", shown?.title ? (live ? "recording" : "not being written") : shown?.gone ? "choose another run" : "waiting for a run");
    at("at").textContent = shown?.steps ? `· ${number.format(shown.steps[1])} steps` : "";
  }

  // -- steps: one range for all charts, by pointer, by number or from an alert ----------------------

  function sayRange(range) {
    const [first, last] = range ?? shown?.steps ?? ["", ""];
    if (document.activeElement !== at("from")) at("from").value = first === "" ? "" : Math.max(0, Math.round(first));
    if (document.activeElement !== at("to")) at("to").value = last === "" ? "" : Math.round(last);
    at("whole").disabled = !range;
  }

  let later = 0;
  function lookClosely(range) {
    // Where nothing was thinned, a closer look shows nothing more.
    if (!shown?.thinned && !window_) return;
    clearTimeout(later);
    later = setTimeout(() => {
      const next = range && [Math.max(0, Math.floor(range[0])), Math.max(0, Math.ceil(range[1]))];
      if (JSON.stringify(next) === JSON.stringify(window_)) return;
      window_ = next;
      changed();
    }, 250);
  }

  async function zoomTo(range) {
    await board.zoom(range);
    sayRange(range);
    lookClosely(range);
  }

  function wholeRun() {
    window_ = null;
    zoomTo(null);
  }

  function see({ step, until }) {
    const end = until ?? step;
    const room = Math.max(20, (end - step) / 4, (shown.steps?.[1] ?? 0) / 50);
    zoomTo([Math.max(0, step - room), end + room]);
    at("charts").scrollIntoView({ block: "start", behavior: "smooth" });
  }

  function typed() {
    const [first, last] = [at("from").valueAsNumber, at("to").valueAsNumber];
    if (first >= 0 && last > first) zoomTo([first, last]);
  }

  // -- the loop: asks, shows, and waits as long as showing has cost, several times over ----------------

  let asking = new AbortController();
  let wake = () => {};
  let urgent = false;

  function changed() {
    remember();
    urgent = true;
    asking.abort();
    wake();
  }

  const pause = (seconds) =>
    new Promise((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });

  async function once() {
    asking = new AbortController();
    const { content, wait } = await ask(question(), asking.signal);
    const start = performance.now();
    if (content) await show(content);
    const cost = (performance.now() - start) / 1000;
    const { content: listed } = await ask("api/runs", asking.signal);
    if (listed) {
      runs.update(listed);
      if (shown) runs.shown(shown.runs);
    }
    sayHow();
    return Math.max(1, wait, 4 * cost);
  }

  async function loop() {
    let failures = 0;
    for (;;) {
      urgent = false;
      let wait = 1;
      try {
        wait = await once();
        failures = 0;
      } catch (error) {
        if (error.name !== "AbortError") {
          document.documentElement.dataset.failed = String(error);
          wait = Math.min(15, 1 + failures++);
          if (error.refused) say("gone", error.message);
          else if (ending) sayHow();
          else say("lost", "the connection is lost; trying again");
          if (!(error instanceof TypeError) && !error.refused) console.error(error);
        }
      }
      if (!urgent) await pause(document.hidden ? 3600 : wait);
    }
  }

  // -- by hand ----------------------------------------------------------------------------------------

  let typing = 0;
  at("layers").value = wanted.layers;
  at("layers").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      wanted.layers = at("layers").value;
      changed();
    }, 300);
  });
  at("layer").addEventListener("change", () => {
    const value = at("layer").value;
    if (!value) openRow(null, "", null);
    else openRow(value.slice(1), "", null);
  });
  at("from").addEventListener("change", typed);
  at("to").addEventListener("change", typed);
  at("whole").addEventListener("click", wholeRun);
  at("tools").addEventListener("submit", (event) => event.preventDefault());
  at("side").addEventListener("toggle", () => dispatchEvent(new Event("resize")));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && wanted.row !== null) closeRow();
  });
  document.addEventListener("visibilitychange", () => wake());
  if (matchMedia("(max-width: 900px)").matches) at("side").open = false;
  loop();
})();
