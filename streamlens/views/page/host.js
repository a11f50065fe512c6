// Draws charts into a page and ties their step axes together. Knows nothing of what they show.
"use strict";

globalThis.streamlensCharts = (() => {
  // What Vega-Lite calls the range of the selection `steps`, which every chart zooms with.
  const RANGE = "steps_step";

  // A view's own size is for pages that do not say; here a chart is as wide as its place.
  function fit(spec) {
    const layers = spec.layer?.map(({ width, ...layer }) => layer);
    return { ...spec, ...(layers && { layer: layers }), width: "container", autosize: { type: "fit-x", contains: "padding" } };
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

  function tie(views) {
    const zoomable = views.filter((view) => {
      try {
        view.signal(RANGE);
        return true;
      } catch {
        return false; // nothing to zoom: Vega throws for a signal it does not know
      }
    });
    let busy = false;
    for (const view of zoomable) {
      view.addSignalListener(RANGE, (_, range) => {
        if (busy) return;
        busy = true;
        const others = zoomable.filter((other) => other !== view);
        Promise.all(others.map((other) => other.signal(RANGE, range).runAsync())).finally(() => { busy = false; });
      });
    }
  }

  // Draws each of `charts` ({place, spec, name}) with configs.light or configs.dark, and again
  // when the colour scheme or the kind of screen changes. Resolves when all are drawn.
  async function mount(charts, configs) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const narrow = matchMedia("(max-width: 640px)");
    let shown = [];
    async function draw() {
      const config = forWidth(dark.matches ? configs.dark : configs.light, narrow.matches);
      for (const result of shown) result.finalize();
      shown = await Promise.all(
        charts.map(({ place, spec, name }) =>
          vegaEmbed(place, fit(spec), {
            config,
            mode: "vega-lite",
            renderer: "canvas",
            ast: true, // no eval: the page's policy forbids it
            downloadFileName: name,
            actions: { export: true, source: false, compiled: false, editor: false },
          }),
        ),
      );
      tie(shown.map((result) => result.view));
      return shown;
    }
    // One after the other: a phone that is turned changes both at once.
    let drawing = Promise.resolve();
    const redraw = () => (drawing = drawing.then(draw));
    dark.addEventListener("change", redraw);
    narrow.addEventListener("change", redraw);
    return redraw();
  }

  return { mount };
})();
