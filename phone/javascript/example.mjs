// docs/phone.md explains this program part by part. Arguments: ADDRESS FOLDER KEY MODEL RAM_BYTES, and `remove` to end with.

import fs from "node:fs";
import os from "node:os";
import { Governor } from "./adapt.mjs";
import { answerOrFallBack, generate } from "./assistant.mjs";
import { choose, lacks, ranked } from "./choose.mjs";
import { FetchError } from "./fetcher.mjs";
import { Library } from "./library.mjs";
import { node } from "./node.mjs";
import { SustainedLoad } from "./record.mjs";

/** Stands for the runtime in this example: it says the question back, word by word. */
class Parrot {
  start(prompt) {
    this.words = prompt.split(" ");
  }

  next() {
    return this.words.length > 0 ? `${this.words.shift()} ` : null;
  }
}

async function run(address, root, key, model, ram, profile) {
  // fetch tiers → verify → choose
  const library = new Library(root, node(address), { pinnedKeys: [key], appVersion: 1 });
  const phone = () => ({ platform: "android", ram_bytes: ram, available_bytes: os.freemem(), maps: false });
  const tiers = await library.tiers(model);
  const { option, refusal } = choose(tiers, phone());
  if (option === null) return console.log(`refused: ${refusal.message}`);

  // fetch parts → verify → install; what has not changed since the last release is not fetched again
  const { release, downloaded, reused } = await library.install(model, option);
  console.log(`${option.variant} release ${release}: ${downloaded} downloaded, ${reused} reused`);

  // prepare → load, or fall back
  const means = {
    installed: library.installed(model),
    lacks: (one) => lacks(one, phone()),
    prepare: () => null, // prepare(content, files, runtime).graph, once a download
    load: () => new Parrot(),
  };
  const answerer = await answerOrFallBack(ranked(tiers, phone()), means, "say this back to me", null);
  console.log(`answered by ${answerer.by}`);
  if (answerer.by !== "device") return console.log(answerer.tried.map(({ variant, why }) => `${variant}: ${why}`).join(", "));

  // generate → adapt, and write down how it went
  const { way } = answerer.option;
  const governor = new Governor(JSON.parse(fs.readFileSync(profile, "utf8")), way);
  const subject = { device: "example", system: os.type(), model, variant: option.variant, release, way, runtime: "none: a parrot" };
  const times = { started: new Date().toISOString(), cold_start_seconds: null, warm_start_seconds: null };
  const record = new SustainedLoad({ ...subject, ...times });
  const began = performance.now();
  const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
  const answer = generate(answerer.model, "say this back to me", governor, { heat: () => ({ celsius: null }), pause, most: 64 });
  for (;;) {
    const { done, value } = await answer.next();
    if (done) return finish(value, record, root);
    process.stdout.write(value);
    record.sample({ seconds: (performance.now() - began) / 1000, tokens: 1, step: governor.step });
  }
}

function finish({ ended }, record, root) {
  console.log(`(${ended})`);
  fs.writeFileSync(`${root}/sustained.json`, JSON.stringify(record));
}

const [address, root, key, model, ram, ...more] = process.argv.slice(2);
try {
  await run(address, root, key, model, Number(ram), "phone/profile.json");
  if (more.includes("remove")) new Library(root, node(address), { pinnedKeys: [key] }).remove(model, "q4");
} catch (error) {
  if (!(error instanceof FetchError)) throw error;
  console.log(`${error.kind}: ${error.message}`);
  process.exitCode = 1;
}
