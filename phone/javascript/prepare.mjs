// Pack a bundle's slices once after the download, so that weights are mapped: pipeline/prepack/device.py, for an app.
//
// A runtime is { version, processor, saveSlice(graph, number, folder) }: saveSlice opens the slice with ONNX Runtime so
// that it packs it, and saves `<number>.onnx` and `<number>.raw` in `folder`. docs/mapped.md has the session's options.

import { parseStrictJson, plain } from "./strict-json.mjs";

const PREPACKED = "prepacked";
const READY = `${PREPACKED}/ready.json`;
const CHUNK = 1 << 22; // bytes

/** The disk has too little room; nothing was begun. */
export class NoRoom extends Error {}

function read(content, files) {
  const work = plain(parseStrictJson(files.read(`${content}/prepack.json`)));
  if (work.version !== 1) throw new Error(`prepack.json: version ${work.version}, this program reads 1`);
  return work;
}

const madeBy = (content, files, { version, processor }) => ({
  bundle: files.sha256(`${content}/prepack.json`),
  onnxruntime: version,
  processor,
});

/** Pack what is not packed yet. Returns the graph to load: { graph, kernels }; kernels null: of no class, weights private. */
export function prepare(content, files, runtime) {
  const work = read(content, files);
  const folder = `${content}/${PREPACKED}`;
  const names = work.slices.map((_, number) => `${number}.data`);
  files.makeFolder(folder);
  for (const name of files.list(folder)) if (!names.includes(name)) files.remove(`${folder}/${name}`);
  // The first slice is always packed: it tells what this processor is, and files may have come from another.
  const found = names.map((name, number) => (number === 0 ? null : files.sha256(`${folder}/${name}`)));
  requireRoom(folder, work, found, files);
  let fitting = Object.entries(work.classes);
  for (const number of names.keys()) {
    const kept = fitting.filter(([, kernels]) => kernels.slices[number].data === found[number]);
    fitting = kept.length > 0 ? kept : pack(content, work, number, fitting, files, runtime);
    if (fitting.length === 0) {
      files.remove(folder);
      return { graph: work.graph, kernels: null };
    }
  }
  const [kernels, { graph }] = fitting[0];
  files.write(`${content}/${READY}`, Buffer.from(JSON.stringify({ kernels, ...madeBy(content, files, runtime) })));
  return { graph, kernels };
}

/** The graph to load now: the merged one if `prepare` came to its end and its files are there, else the bundle's own. */
export function prepared(content, files, runtime) {
  const work = read(content, files);
  try {
    const { kernels, ...made } = JSON.parse(files.read(`${content}/${READY}`));
    const sound = JSON.stringify(made) === JSON.stringify(madeBy(content, files, runtime));
    const { graph, slices } = work.classes[kernels];
    // Beyond the end of a mapped file is a bus error, not an exception.
    const whole = slices.every(({ bytes }, number) => files.size(`${content}/${PREPACKED}/${number}.data`) === bytes);
    if (sound && whole) return { graph, kernels };
  } catch {} // not prepared, or damaged: prepare again
  return { graph: work.graph, kernels: null };
}

/** Write a slice's data; those of the classes `fitting` that it is of. */
function pack(content, work, number, fitting, files, runtime) {
  const folder = `${content}/${PREPACKED}`;
  const [graph, raw, data] = ["onnx", "raw", "data"].map((end) => `${folder}/${number}.${end}`);
  runtime.saveSlice(`${content}/${work.slices[number]}`, number, folder);
  const [saved, size] = [files.sha256(graph), files.size(raw)];
  let fits = fitting.filter(([, { slices }]) => slices[number].saved === saved && slices[number].raw === size);
  files.remove(data);
  if (fits.length > 0) {
    keep(raw, fits[0][1].slices[number].kept, data, files);
    fits = fits.filter(([, { slices }]) => slices[number].data === files.sha256(data));
  }
  for (const left of [graph, raw]) files.remove(left);
  return fits;
}

/** Copy ranges [offset in raw, length, offset in data], with zeros between them. */
function keep(raw, kept, data, files) {
  const file = files.append(`${data}.new`);
  let written = 0;
  for (const [offset, length, target] of kept) {
    file.write(Buffer.alloc(target - written));
    for (let at = 0; at < length; at += CHUNK) file.write(files.range(raw, offset + at, Math.min(CHUNK, length - at)));
    written = target + length;
  }
  file.close();
  files.move(`${data}.new`, data);
}

function requireRoom(folder, work, found, files) {
  const peaks = Object.values(work.classes).map(({ slices }) => {
    const missing = slices.filter(({ data }, number) => data !== found[number]);
    return missing.reduce((sum, { bytes }) => sum + bytes, 0) + Math.max(0, ...missing.map(({ raw }) => raw));
  });
  const [needed, free] = [Math.max(0, ...peaks), files.free(folder)];
  if (free < needed) throw new NoRoom(`${needed} bytes are needed to prepare ${work.graph}, ${free} are free`);
}
