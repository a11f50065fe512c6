// Draws charts into a page and ties their step axes together. Knows nothing of what they show.
"use strict";

globalThis.streamlensCharts = (() => {
  // What Vega-Lite calls the range of the selection `steps`, which every chart zooms with.
  const RANGE = "steps_step";
  // The parameter of a chart without a step axis that shows which steps the others are zoomed to.
  const FOLLOWS = "steps_shown";
  // Where it keeps what a selection has chosen. Where the pointer was is nothing to keep.
  const CHOSEN = /^(?!hover|steps).*_store$/;

  // A view's own size is for pages that do not say; here a chart is as wide as its place.
  function fit(spec) {
    if (!spec.layer && !spec.mark) return spec; // views side by side have widths of their own
    const layers = spec.layer?.map(({ width, ...layer }) => layer);
    return { ...spec, ...(layers && { layer: layers }), width: "container", autosize: { type: "fit-x", contains: "padding" } };
  }

  // By which signal a view is tied to the others; null for none.
  function tiedBy(view) {
    const tied = [RANGE, FOLLOWS].find((signal) => {
      try {
        view.signal(signal);
        return true;
      } catch {
        return false; // Vega throws for a signal it does not know
      }
    });
    return tied ?? null;
  }

  function filled({ spec, data = {}, signals = {} }) {
    const params = spec.params?.map((param) => (param.name in signals ? { ...param, value: signals[param.name] } : param));
    return { ...spec, ...(params && { params }), datasets: { ...spec.datasets, ...data } };
  }

  function forWidth(config, narrow) {
    if (!narrow) return config;
    const { minExtent, ...axisY } = config.axisY;
    return {
      ...config,
      axisX: { ...config.axisX, tickCount: 5 },
      axisY: { ...axisY, labelLimit: 84, ...(minExtent && { minExtent: Math.min(minExtent, 84) }) },
      legend: { ...config.legend, columns: 2, gradientLength: 160 },
    };
  }

  // Charts that share one range of steps. `onZoom(range)` is told of a range that somebody chose, null for the
  // whole run; `onClick(chart, datum)` of the mark that was clicked.
  function board({ onZoom, onClick } = {}) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const narrow = matchMedia("(max-width: 640px)");
    const shown = new Map(); // by place: {chart, result, tied}
    let configs = null;
    let themed = "";
    let range = null;
    let moving = false;

    function move(except) {
      moving = true;
      const others = [...shown.values()].filter(({ tied, result }) => tied && result.view !== except);
      return Promise.all(others.map(({ tied, result }) => result.view.signal(tied, range).runAsync())).finally(() => { moving = false; });
    }

    async function tie(view) {
      const tied = tiedBy(view);
      if (!tied) return null;
      if (range) await view.signal(tied, range).runAsync();
      if (tied === RANGE) {
        view.addSignalListener(RANGE, (_, chosen) => {
          if (moving) return;
          range = chosen ?? null;
          move(view);
          onZoom?.(range);
        });
      }
      return tied;
    }

    function watch(view, chart) {
      let down = null;
      view.addEventListener("pointerdown", ({ clientX, clientY }) => { down = [clientX, clientY]; });
      view.addEventListener("click", ({ clientX, clientY }, item) => {
        // A drag ends in a click too.
        const still = down && Math.hypot(clientX - down[0], clientY - down[1]) < 4;
        if (still && item?.datum) onClick(chart, item.datum);
      });
    }

    function chosenIn(view) {
      return Object.entries(view.getState({ data: (name) => CHOSEN.test(name), signals: () => false }).data ?? {});
    }

    async function embed(chart) {
      const old = shown.get(chart.place);
      const kept = old ? chosenIn(old.result.view) : [];
      chart.place.style.minHeight = `${chart.place.offsetHeight}px`; // so that the page does not jump
      old?.result.finalize();
      const result = await vegaEmbed(chart.place, fit(filled(chart)), {
        config: forWidth(dark.matches ? configs.dark : configs.light, narrow.matches),
        mode: "vega-lite",
        renderer: "canvas",
        ast: true, // no eval: the page's policy forbids it
        downloadFileName: chart.name,
        actions: { export: true, source: false, compiled: false, editor: false },
      });
      chart.place.style.minHeight = "";
      for (const [name, rows] of kept) {
        try {
          result.view.data(name, rows);
        } catch {
          // the chart has no such selection any more
        }
      }
      if (kept.some(([, rows]) => rows?.length)) await result.view.runAsync();
      const tied = await tie(result.view);
      if (onClick) watch(result.view, chart);
      shown.set(chart.place, { chart, result, tied });
    }

    async function swap(entry, chart) {
      const { view } = entry.result;
      for (const [name, rows] of Object.entries(chart.data ?? {})) view.data(name, rows);
      for (const [name, value] of Object.entries(chart.signals ?? {})) view.signal(name, value);
      await view.runAsync();
      entry.chart = chart;
    }

    async function draw(charts, anew) {
      const wanted = new Set(charts.map(({ place }) => place));
      for (const [place, { result }] of shown) {
        if (wanted.has(place)) continue;
        result.finalize();
        shown.delete(place);
      }
      for (const chart of charts) {
        const entry = shown.get(chart.place);
        const same = entry && !anew && chart.form !== undefined && entry.chart.form === chart.form;
        await (same ? swap(entry, chart) : embed(chart));
      }
      return [...shown.values()].map(({ result }) => result);
    }

    // One after the other: a phone that is turned changes both at once.
    let drawing = Promise.resolve();
    let last = [];
    const redraw = (anew) => (drawing = drawing.catch(() => {}).then(() => draw(last, anew)));
    dark.addEventListener("change", () => redraw(true));
    narrow.addEventListener("change", () => redraw(true));

    return {
      // Shows exactly these charts: {place, spec, name}, and where rows come later a `form`, equal for equal
      // specifications, with `data` and `signals`. What is there already keeps its zoom and its selections.
      show(charts, wantedConfigs) {
        const text = JSON.stringify(wantedConfigs);
        const anew = text !== themed;
        [configs, themed, last] = [wantedConfigs, text, charts];
        return redraw(anew);
      },
      // Moves all charts to a range of steps; null for the whole run.
      zoom(wanted) {
        range = wanted;
        return move(null);
      },
      get range() {
        return range;
      },
      viewOf: (place) => shown.get(place)?.result.view,
    };
  }

  // Draws each of `charts` once, with configs.light or configs.dark. Resolves when all are drawn.
  const mount = (charts, configs) => board().show(charts, configs);

  return { board, mount, fit, tiedBy, RANGE };
})();
