// Runs test vectors: node vectors.mjs FOLDER, where FOLDER was written by `python -m pipeline vectors FOLDER`.
// A line for every vector that is answered otherwise than expected, then "N of M vectors agree"; status 1 unless all do.

import fs from "node:fs";
import path from "node:path";
import { verifyBundle } from "./bundle-verifier.mjs";

function answer(folder, vector) {
  const { findings } = verifyBundle(path.join(folder, "bundle"), {
    kind: vector.kind,
    pinnedKeys: vector.pinned_keys,
    now: new Date(vector.now),
    highestRelease: vector.highest_release,
    allowDevelopment: vector.allow_development,
    appVersion: vector.app_version,
    tier: vector.tier,
    model: vector.model,
    variant: vector.variant,
  });
  return [...new Set(findings.map(({ kind, file }) => `${kind}: ${file}`))].sort();
}

const root = process.argv[2];
const names = fs.readdirSync(root).sort();
let agree = 0;
for (const name of names) {
  const vector = JSON.parse(fs.readFileSync(path.join(root, name, "vector.json"), "utf8"));
  const expected = vector.findings.map(([kind, file]) => `${kind}: ${file}`).sort();
  const found = answer(path.join(root, name), vector);
  if (found.join("\n") === expected.join("\n")) agree += 1;
  else console.log(`${name}: expected [${expected.join(", ")}], found [${found.join(", ")}]`);
}
console.log(`${agree} of ${names.length} vectors agree`);
process.exitCode = agree === names.length && agree > 0 ? 0 : 1;
