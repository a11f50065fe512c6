// The report's own start: draws what is embedded in it.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("charts").map(({ id, spec, name }) => ({ place: document.getElementById(id), spec, name }));
  streamlensCharts.mount(charts, read("configs")).then(
    () => { document.documentElement.dataset.drawn = charts.length; },
    (error) => {
      document.documentElement.dataset.failed = "";
      throw error;
    },
  );
})();
