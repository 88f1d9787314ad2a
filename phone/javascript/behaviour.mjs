// Runs the behaviour vectors: node behaviour.mjs FOLDER, where FOLDER is phone/vectors. A line for every case that is
// answered otherwise than expected, then "N of M cases agree"; status 1 unless all do.

import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { isDeepStrictEqual } from "node:util";
import { Governor } from "./adapt.mjs";
import { answerOrFallBack, generate, overlay } from "./assistant.mjs";
import { choose, lacks, ranked } from "./choose.mjs";
import { Fetcher, FetchError, Interrupted } from "./fetcher.mjs";
import { Releases, StateError } from "./library.mjs";
import { files } from "./node.mjs";
import { decide, doubts, isPrivate } from "./policy.mjs";
import { NoRoom, prepare, prepared } from "./prepare.mjs";

const bytesOf = ({ text, times }) => Buffer.from(text.repeat(times));

/** A folder that is gone afterwards. */
async function inFolder(use) {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "phone-"));
  try {
    return await use(folder);
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

function chooses({ device }, shared) {
  const { option, refusal } = choose(shared, device);
  if (option === null) return { refused: refusal.kind, missing_bytes: refusal.missing_bytes };
  return { variant: option.variant, tier: option.tier, weights: option.way.weights };
}

async function fallsBack({ device, installed, broken, kernels, cloud }, shared) {
  const load = ({ variant, way }) => {
    if (broken.some((one) => isDeepStrictEqual(one, [variant, way.weights]))) throw new Error("it does not load");
    return {};
  };
  const means = { installed, lacks: (option) => lacks(option, device), prepare: () => (kernels ? "mapped.onnx" : null), load };
  const ask = () => {
    if (cloud === "fails") throw new Error("no answer");
    return "an answer";
  };
  const found = await answerOrFallBack(ranked(shared, device), means, "a question", cloud === "forbidden" ? null : ask);
  const tried = found.tried.map(({ variant, weights, why }) => [variant, weights, why]);
  return { by: found.by, variant: found.option?.variant ?? null, weights: found.option?.way.weights ?? null, tried };
}

function heats({ way, readings }, { profile }) {
  const governor = new Governor(profile, way);
  const steps = readings.map((reading) => governor.observe(reading));
  return { steps, settings: governor.settings };
}

async function answers({ way, celsius, pieces, most }, { profile }) {
  const [left, readings] = [[...celsius], { celsius: null }];
  const heat = () => Object.assign(readings, { celsius: left.shift() ?? readings.celsius });
  let [paused_ms, said, started] = [0, 0, null];
  const model = {
    start: (_, { threads, prefill_chunk }) => (started = { threads, prefill_chunk }),
    next: () => (said++ < pieces ? "word" : null),
  };
  const pause = (milliseconds) => (paused_ms += milliseconds);
  const answer = generate(model, "a question", new Governor(profile, way), { heat, pause, most });
  for (;;) {
    const { done, value } = await answer.next();
    if (done) return { ...value, paused_ms, started };
  }
}

const overlays = ({ way, settings, graph }) => overlay(way, settings, graph ?? undefined);

const records = ({ file, record }) =>
  inFolder((folder) => {
    const state = `${folder}/releases.json`;
    if (file !== null) fs.writeFileSync(state, file);
    const outcomes = record.map(([subject, release]) => {
      try {
        new Releases(state, files).record(subject, release);
        return "ok";
      } catch (error) {
        if (error instanceof StateError) return error.kind;
        throw error;
      }
    });
    const unreadable = outcomes.includes("unreadable");
    return { outcomes, releases: unreadable ? null : JSON.parse(fs.readFileSync(state, "utf8")).releases };
  });

/** A place that answers as a case says, and remembers what it was asked for. */
class Place {
  constructor({ files: served, answers: told = {} }, requests) {
    const flat = (steps) => steps.flatMap((step) => Array(step.times ?? 1).fill(step));
    this.blobs = new Map();
    for (const [name, file] of Object.entries(served)) {
      const at = `blobs/sha256/${files.digest(bytesOf(file))}`;
      if (!this.blobs.has(at)) this.blobs.set(at, { name, bytes: bytesOf(file), steps: flat(told[name] ?? []) });
    }
    this.requests = requests;
  }

  get(at, start) {
    const { name, bytes, steps } = this.blobs.get(at);
    this.requests.push([name, start]);
    const step = steps.shift() ?? {};
    if (step.silent) throw new Interrupted("no connection");
    const from = step.no_range ? 0 : start;
    const total = step.claim ?? bytes.length;
    const body = Buffer.from(bytes);
    if (step.flip !== undefined) body[step.flip] ^= 1;
    const status = step.status ?? (from > 0 || step.range ? 206 : 200);
    const range = status === 206 ? step.range ?? `bytes ${from}-${total - 1}/${total}` : null;
    return { status, range, length: String(total), body: Place.pieces(body.subarray(from), step.cut) };
  }

  static async *pieces(body, cut) {
    yield body.subarray(0, cut);
    if (cut !== undefined) throw new Interrupted("cut");
  }
}

function lay(folder, { files: wanted, left = {}, installed = {} }) {
  for (const [name, file] of Object.entries(installed)) files.write(`${folder}/installed/${name}`, bytesOf(file));
  for (const [name, { bytes, spoilt }] of Object.entries(left)) {
    const whole = wanted[name] ? bytesOf(wanted[name]) : Buffer.from("of another release");
    const kept = Buffer.concat([whole, Buffer.alloc(bytes)]).subarray(0, bytes).map((byte) => (spoilt ? byte ^ 1 : byte));
    files.write(`${folder}/parts/${files.digest(whole)}.partial`, kept);
  }
}

const fetches = (given) =>
  inFolder(async (folder) => {
    lay(folder, given);
    const wanted = new Map(
      Object.entries(given.files).map(([name, file]) => [name, { size: bytesOf(file).length, sha256: files.digest(bytesOf(file)) }]),
    );
    const [requests, pauses, network] = [[], [], [...(given.metered ?? [false])]];
    const disk = { ...files, free: () => given.free ?? Infinity };
    const options = {
      metered: () => (network.length > 1 ? network.shift() : network[0]),
      metered_bytes: given.metered_bytes ?? 0,
      pause: (milliseconds) => pauses.push(milliseconds),
    };
    const fetcher = new Fetcher(new Place(given, requests), disk, options);
    const { download, reused } = fetcher.plan(wanted, `${folder}/parts`, `${folder}/installed`);
    let outcome = "ok";
    try {
      await fetcher.fetch(wanted, `${folder}/parts`, `${folder}/installed`);
      for (const { sha256 } of wanted.values()) if (files.sha256(`${folder}/parts/${sha256}`) !== sha256) outcome = "not there";
    } catch (error) {
      if (!(error instanceof FetchError)) throw error;
      outcome = error.kind;
    }
    const left = {};
    for (const name of files.list(`${folder}/parts`).filter((one) => one.endsWith(".partial"))) {
      const [[known]] = [...wanted].filter(([, { sha256 }]) => name.startsWith(sha256));
      left[known] = files.size(`${folder}/parts/${name}`);
    }
    return { outcome, download, reused, requests, left, pauses };
  });

const prepares = ({ saves, before, free }, { prepack }) =>
  inFolder((folder) => {
    files.write(`${folder}/prepack.json`, Buffer.from(JSON.stringify(prepack)));
    for (const [name, text] of Object.entries(before)) files.write(`${folder}/prepacked/${name}`, Buffer.from(text, "latin1"));
    const packs = [];
    const saveSlice = (_, number, target) => {
      packs.push(number);
      files.write(`${target}/${number}.onnx`, Buffer.from(saves[number].graph));
      files.write(`${target}/${number}.raw`, Buffer.from(saves[number].raw));
    };
    const runtime = { version: "1.32.0", processor: "one", saveSlice };
    let found = { graph: null, kernels: null };
    try {
      found = prepare(folder, { ...files, free: () => free }, runtime);
    } catch (error) {
      if (!(error instanceof NoRoom)) throw error;
    }
    const there = files.list(`${folder}/prepacked`).filter((name) => name !== "ready.json");
    const texts = there.map((name) => [name, files.read(`${folder}/prepacked/${name}`).toString("latin1")]);
    return { ...found, packs, files: Object.fromEntries(texts), then: prepared(folder, files, runtime).graph };
  });

/** policy.json has three lists, and defaults that a case may change. */
function policies({ defaults, decisions, doubts: doubted, tags }) {
  const full = (one) => ({ ...one, limits: { ...defaults.limits, ...one.limits }, situation: { ...defaults.situation, ...one.situation } });
  return [
    ...decisions.map((one) => [one, () => decide(full(one))]),
    ...doubted.map((one) => [one, () => doubts(one.logprobs, one.tokens, one.threshold)]),
    ...tags.map((one) => [one, () => isPrivate(one.tags, one.known)]),
  ];
}

const RUNS = {
  answer: answers,
  choose: chooses,
  fall_back: fallsBack,
  fetch: fetches,
  heat: heats,
  overlay: overlays,
  prepare: prepares,
  releases: records,
};

let [agree, all] = [0, 0];
for (const file of fs.readdirSync(process.argv[2]).sort()) {
  const shared = JSON.parse(fs.readFileSync(path.join(process.argv[2], file), "utf8"));
  const kind = path.basename(file, ".json");
  const cases = kind === "policy" ? policies(shared) : shared.cases.map((one) => [one, () => RUNS[kind](one, shared)]);
  for (const [{ name, expect }, run] of cases) {
    const found = await run();
    all += 1;
    if (isDeepStrictEqual(found, expect)) agree += 1;
    else console.log(`${kind}: ${name}: expected ${JSON.stringify(expect)}, found ${JSON.stringify(found)}`);
  }
}
console.log(`${agree} of ${all} cases agree`);
process.exitCode = agree === all && all > 0 ? 0 : 1;
