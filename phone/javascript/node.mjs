// What the core asks of Node 20: a disk and a network. An app for another JavaScript runtime writes these two again.

import crypto from "node:crypto";
import fs from "node:fs";
import http from "node:http";
import https from "node:https";
import path from "node:path";
import { openSignature, verifyBundle } from "./bundle-verifier.mjs";
import { Interrupted } from "./fetcher.mjs";

const CHUNK = 1 << 18;
const SILENCE = 30_000; // milliseconds between two pieces of an answer

/** Synchronous, as far as the core needs a disk. What is moved or written is on the disk before its new name is. */
export const files = {
  size: (file) => {
    const stat = fs.lstatSync(file, { throwIfNoEntry: false });
    return stat?.isFile() ? stat.size : null;
  },
  list: (folder) => (fs.existsSync(folder) ? fs.readdirSync(folder).sort() : []),
  free: (folder) => {
    const { bavail, bsize } = fs.statfsSync(folder);
    return bavail * bsize;
  },
  digest: (bytes) => crypto.createHash("sha256").update(bytes).digest("hex"),
  sha256: (file) => (files.size(file) === null ? null : hashOf(file).digest("hex")),
  read: (file) => (fs.existsSync(file) ? fs.readFileSync(file) : null),
  range: (file, offset, length) => {
    const [descriptor, bytes] = [fs.openSync(file, "r"), Buffer.alloc(length)];
    try {
      if (fs.readSync(descriptor, bytes, 0, length, offset) !== length) throw new RangeError(`${file} ends before byte ${offset + length}`);
    } finally {
      fs.closeSync(descriptor);
    }
    return bytes;
  },
  makeFolder: (folder) => fs.mkdirSync(folder, { recursive: true }),
  remove: (file) => fs.rmSync(file, { recursive: true, force: true }),
  copy: (from, to) => fs.copyFileSync(from, to),
  move: (from, to) => {
    if (!fs.existsSync(from)) return;
    sync(from);
    fs.renameSync(from, to);
    sync(path.dirname(to));
  },
  write: (file, bytes) => {
    files.makeFolder(path.dirname(file));
    fs.writeFileSync(`${file}.new`, bytes);
    files.move(`${file}.new`, file);
  },
  /** A file to be written on at its end, with the SHA-256 of all its bytes. */
  append: (file) => {
    const [hash, size] = [hashOf(file), files.size(file) ?? 0];
    const descriptor = fs.openSync(file, "a");
    const write = (bytes) => {
      fs.writeFileSync(descriptor, bytes);
      hash.update(bytes);
    };
    return { size, write, digest: () => hash.digest("hex"), close: () => fs.closeSync(descriptor) };
  },
};

function sync(file) {
  const descriptor = fs.openSync(file, "r");
  fs.fsyncSync(descriptor);
  fs.closeSync(descriptor);
}

function hashOf(file) {
  const [hash, size] = [crypto.createHash("sha256"), files.size(file) ?? 0];
  for (let at = 0; at < size; at += CHUNK) hash.update(files.range(file, at, Math.min(CHUNK, size - at)));
  return hash;
}

/** A place of publication behind https (or http, for tests on one machine). Redirects are answers that end the fetch. */
export function httpPlace(address) {
  const base = address.replace(/\/$/, "");
  const { get } = base.startsWith("https:") ? https : http;
  return {
    get: (file, start) =>
      new Promise((resolve, reject) => {
        const headers = { "Accept-Encoding": "identity", ...(start > 0 ? { Range: `bytes=${start}-` } : {}) };
        const request = get(`${base}/${file}`, { headers, timeout: SILENCE }, (answer) => resolve(answered(answer)));
        request.on("timeout", () => request.destroy(new Error("no answer in time")));
        request.on("error", (error) => reject(new Interrupted(error.message)));
      }),
  };
}

function answered(answer) {
  const { "content-range": range = null, "content-length": length = null, "retry-after": later } = answer.headers;
  return { status: answer.statusCode, range, length, retry_after: Number(later) * 1000 || 0, body: breakable(answer) };
}

async function* breakable(answer) {
  try {
    yield* answer;
  } catch (error) {
    throw new Interrupted(error.message);
  }
}

/** What a Library needs of this machine. */
export const node = (address) => ({ files, place: httpPlace(address), verify: verifyBundle, openSignature });
