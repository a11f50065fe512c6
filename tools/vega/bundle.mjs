// Called by build.sh: writes vega.min.js, LICENSES.txt and README.md into the folder given.
import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { build } from "esbuild";

const out = process.argv[2];
const manifest = JSON.parse(readFileSync("package.json", "utf8"));

await build({
  entryPoints: ["entry.js"],
  outfile: join(out, "vega.min.js"),
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  charset: "ascii",
  legalComments: "none", // all of them stand in LICENSES.txt
});

const bundle = readFileSync(join(out, "vega.min.js"), "utf8");
for (const unsafe of [/<\/script/i, /<!--/]) {
  if (unsafe.test(bundle)) throw new Error(`the bundle holds ${unsafe}: it cannot be inlined in a page`);
}

// The whole closure of dependencies, also where tree shaking left little of a package: some of them
// are published with others already inside, which esbuild cannot tell.
const folders = execFileSync("npm", ["ls", "--omit=dev", "--all", "--parseable"], { encoding: "utf8" })
  .trim()
  .split("\n")
  .slice(1);
const packages = [...new Set(folders)]
  .map((folder) => {
    const { name, version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const file = readdirSync(folder).find((entry) => /^(licen[cs]e|copying)/i.test(entry));
    if (!file) throw new Error(`${name} has no licence file: add its text by hand`);
    return { name, version, license, text: readFileSync(join(folder, file), "utf8").trim() };
  })
  .sort((a, b) => (a.name < b.name ? -1 : 1));

const rule = "=".repeat(80);
const head = "vega.min.js contains code of the packages below, each under its own licence.";
const parts = packages.map((p) => `${rule}\n${p.name} ${p.version} (${p.license})\n${rule}\n\n${p.text}`);
writeFileSync(join(out, "LICENSES.txt"), `${head}\n\n${parts.join("\n\n")}\n`);

const version = (name) => packages.find((p) => p.name === name).version;
const rows = Object.keys(manifest.dependencies).map((name) => `| ${name} | ${version(name)} |`);
const size = Math.round(bundle.length / 1000);
writeFileSync(
  join(out, "README.md"),
  `# The Vega bundle

\`vega.min.js\` (${size} kB) draws every chart of streamlens without a network. It is one classic script that
sets \`vega\`, \`vegaLite\` and \`vegaEmbed\` on the page. It is generated: do not edit it, nor this file.

| package | version |
|---|---|
${rows.join("\n")}

\`LICENSES.txt\` holds the licences of these packages and of all they depend on (${packages.length} in all).

To rebuild: \`tools/vega/build.sh\` (Node 20). To upgrade: change the versions in \`tools/vega/package.json\`, run
\`npm install\` there, then the script. The major and minor version of vega-lite must be the ones that
\`altair.SCHEMA_VERSION\` names; a test compares them.
`,
);
console.log(`${size} kB, ${packages.length} licences`);
