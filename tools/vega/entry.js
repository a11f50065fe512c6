// What the bundle puts on the page: the three names under which Vega's own builds are known.
import embed from "vega-embed";
import * as vega from "vega";
import * as vegaLite from "vega-lite";

globalThis.vega = vega;
globalThis.vegaLite = vegaLite;
globalThis.vegaEmbed = embed;
