// The list of runs: a list box with one place in the order of tabs, in which keys move and choose.
"use strict";

globalThis.streamlensRuns = (() => {
  const box = document.getElementById("runs");
  const find = document.getElementById("find");
  const number = new Intl.NumberFormat();

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function ago(seconds) {
    const passed = Date.now() / 1000 - seconds;
    if (passed < 90) return "just now";
    if (passed < 5400) return `${Math.round(passed / 60)} min ago`;
    if (passed < 129600) return `${Math.round(passed / 3600)} h ago`;
    return new Date(seconds * 1000).toLocaleDateString();
  }

  // Fills a list with texts, an item each.
  function fill(list, texts) {
    list.replaceChildren(...texts.map((text) => element("li", "", text)));
  }

  // `onChoose(keys)` is told when somebody chose other runs.
  function list({ onChoose }) {
    let runs = [];
    let chosen = new Set();

    const options = () => [...box.children];
    const choose = (keys) => {
      chosen = new Set(keys);
      mark();
      onChoose([...chosen]);
    };
    const toggle = (key) => {
      const next = new Set(chosen);
      if (!next.delete(key)) next.add(key);
      if (next.size) choose(next);
    };

    function mark() {
      for (const option of options()) option.setAttribute("aria-selected", String(chosen.has(option.dataset.key)));
      const focused = options().find((option) => option === document.activeElement);
      const entry = focused ?? options().find((option) => chosen.has(option.dataset.key)) ?? options()[0];
      for (const option of options()) option.tabIndex = option === entry ? 0 : -1;
    }

    function optionOf(run) {
      const made = element("div", "run");
      made.setAttribute("role", "option");
      made.dataset.key = run.key;
      made.append(element("span", "box"), element("span", "name"), element("span", "about"));
      made.firstChild.setAttribute("aria-hidden", "true");
      return made;
    }

    function say(option, run) {
      const steps = run.steps === null ? "no step yet" : `${number.format(run.steps)} steps`;
      const about = [run.model, steps, run.live ? "recording" : ago(run.written)].filter(Boolean).join(" · ");
      const [, name, said] = option.children;
      // Only what changed is written: a screen reader reads nothing twice.
      if (name.textContent !== run.title) name.textContent = run.title;
      if (said.textContent !== about) said.textContent = about;
      said.classList.toggle("live", run.live);
      option.title = `${run.place} · ${run.id}`;
    }

    function draw() {
      const wanted = find.value.trim().toLowerCase();
      const visible = runs.filter((run) => `${run.title} ${run.model} ${run.place} ${run.id}`.toLowerCase().includes(wanted));
      const known = new Map(options().map((option) => [option.dataset.key, option]));
      const had = document.activeElement?.dataset?.key;
      const wantedOptions = visible.map((run) => {
        const option = known.get(run.key) ?? optionOf(run);
        say(option, run);
        return option;
      });
      const same = wantedOptions.length === box.children.length && wantedOptions.every((o, i) => box.children[i] === o);
      if (!same) {
        box.replaceChildren(...wantedOptions);
        if (had) known.get(had)?.focus();
      }
      document.getElementById("count").textContent = runs.length ? `${visible.length} of ${runs.length}` : "none yet";
      mark();
    }

    box.addEventListener("click", (event) => {
      const option = event.target.closest(".run");
      if (!option) return;
      option.focus();
      const several = event.target.classList.contains("box") || event.ctrlKey || event.metaKey || event.shiftKey;
      if (several) toggle(option.dataset.key);
      else choose([option.dataset.key]);
    });
    box.addEventListener("keydown", (event) => {
      const all = options();
      const at = all.indexOf(document.activeElement);
      const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 };
      if (event.key in moves) {
        const to = all[Math.max(0, Math.min(all.length - 1, moves[event.key]))];
        to?.focus();
        mark();
      } else if (event.key === "Enter" && at >= 0) choose([all[at].dataset.key]);
      else if (event.key === " " && at >= 0) toggle(all[at].dataset.key);
      else return;
      event.preventDefault();
    });
    find.addEventListener("input", draw);
    find.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowDown" && event.key !== "Enter") return;
      event.preventDefault();
      options()[0]?.focus();
      mark();
    });

    return {
      // What the server lists now.
      update({ runs: listed, problems }) {
        runs = listed;
        draw();
        fill(document.getElementById("broken"), problems);
      },
      // What is shown, also where nobody chose it.
      shown(keys) {
        chosen = new Set(keys);
        mark();
      },
      liveAmong: (keys) => runs.some((run) => run.live && keys.includes(run.key)),
    };
  }

  return { element, fill, list, number };
})();
