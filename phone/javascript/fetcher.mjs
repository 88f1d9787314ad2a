// The files of a bundle, over connections that break, onto a disk that may be too small, without surprise on the bill.
//
// A place is { get(path, start) } and answers { status, range, length, retry_after, body }: `range` and `length` are the
// headers Content-Range and Content-Length (or null), `body` is an async iterable of bytes. It throws `Interrupted` when
// it did not answer. A file is asked for by the SHA-256 of its bytes, so what an interrupted run left can always be gone
// on with: whatever the server meanwhile did, the digest decides. `files` is node.mjs's interface to a disk.

const ATTEMPTS = 8; // requests in a row that bring nothing new end a fetch
const PASSING = [408, 425, 429, 500, 502, 503, 504];
const LONGEST_PAUSE = 60_000; // milliseconds

/** A transfer that broke and may be tried again; retry_after in milliseconds. */
export class Interrupted extends Error {
  constructor(message, retry_after = 0) {
    super(message);
    this.retry_after = retry_after;
  }
}

/** Why nothing was fetched. kind: disk, metered, missing, interrupted, wrong-size, wrong-bytes, refused, not-accepted. */
export class FetchError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

const blob = (sha256) => `blobs/sha256/${sha256}`;

/** The first byte of an answer to a request from `start` on, and the whole file's size, null if the server does not say. */
function begun({ status, range, length, retry_after }, path, start, size) {
  if (PASSING.includes(status)) throw new Interrupted(`HTTP ${status}`, retry_after ?? 0);
  if (status === 404 || status === 410) throw new FetchError("missing", `${path} is not there (HTTP ${status})`);
  if (status === 416) throw new FetchError("wrong-size", `${path} ends before byte ${start}`);
  if (status !== 200 && status !== 206) throw new FetchError("refused", `${path}: HTTP ${status}`);
  const told = status === 206 ? /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(range ?? "") : [null, "0", length ?? "*"];
  if (told === null || (status === 206 && Number(told[1]) !== start)) {
    throw new FetchError("refused", `${path}: asked for byte ${start} on, got ${range}`);
  }
  const total = told[2] === "*" ? null : Number(told[2]);
  if (size !== null && total !== null && total !== size) {
    throw new FetchError("wrong-size", `${path} has ${total} bytes there, ${size} were signed`);
  }
  return Number(told[1]);
}

/** Fetches parts under one network policy. */
export class Fetcher {
  /**
   * metered: () => whether the network costs money now. metered_bytes: how much may be fetched over such a network;
   * Infinity where the user agreed. pause: waits for milliseconds. progress: told of bytes as they arrive.
   */
  constructor(place, files, options = {}) {
    const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
    Object.assign(this, { metered: () => false, metered_bytes: 0, pause: sleep, progress: () => {}, ...options });
    this.place = place;
    this.files = files;
  }

  /** The bytes of `path` from `start` to `size` (null: to its end), over as many requests as it takes. */
  async *stream(path, start, size, allow = () => {}) {
    let position = start;
    for (let failures = 0; size === null || position < size; ) {
      const reached = position;
      allow();
      try {
        const answer = await this.place.get(path, position);
        let skip = position - begun(answer, path, position, size);
        for await (let chunk of answer.body) {
          const skipped = Math.min(skip, chunk.length); // a server without Range begins at the first byte again
          skip -= skipped;
          chunk = chunk.subarray(skipped, size === null ? undefined : skipped + size - position);
          position += chunk.length;
          if (chunk.length > 0) yield chunk;
          if (position === size) return;
        }
        if (size === null) return;
        throw new Interrupted("the answer ended early");
      } catch (error) {
        if (!(error instanceof Interrupted)) throw error;
        failures = position > reached ? 1 : failures + 1;
        if (failures >= ATTEMPTS) {
          throw new FetchError("interrupted", `${path}: ${failures} requests brought nothing beyond byte ${position}: ${error.message}`);
        }
        await this.pause(Math.min(LONGEST_PAUSE, Math.max(error.retry_after, failures > 1 ? 500 * 2 ** (failures - 2) : 0)));
      }
    }
  }

  /** A small file of unknown size, at most `limit` bytes. */
  async small(path, limit) {
    const chunks = [];
    let size = 0;
    for await (const chunk of this.stream(path, 0, null)) {
      size += chunk.length;
      if (size > limit) throw new FetchError("wrong-size", `${path} has more than ${limit} bytes`);
      chunks.push(chunk);
    }
    return Buffer.concat(chunks);
  }

  /**
   * What bringing the files `wanted` (name → { size, sha256 }) into the folder `parts` takes, and what to reuse:
   * { download, reused } in bytes, and { copies }: digest → path of an installed file.
   */
  plan(wanted, parts, installed = null) {
    const entries = new Map([...wanted.values()].map((entry) => [entry.sha256, entry.size]));
    const total = [...entries.values()].reduce((sum, size) => sum + size, 0);
    const copies = new Map();
    for (const name of installed === null ? [] : this.files.list(installed)) {
      const [path, size] = [`${installed}/${name}`, this.files.size(`${installed}/${name}`)];
      if (size === null || ![...entries.values()].includes(size)) continue;
      const sha256 = this.files.sha256(path);
      if (entries.has(sha256) && this.files.size(`${parts}/${sha256}`) === null) copies.set(sha256, path);
    }
    let download = 0;
    for (const [sha256, size] of entries) if (!copies.has(sha256)) download += size - this.kept(parts, sha256, size);
    return { download, reused: total - download, copies };
  }

  /** Bytes of a file that an earlier run left. */
  kept(parts, sha256, size) {
    if (this.files.size(`${parts}/${sha256}`) !== null) return size;
    const left = this.files.size(`${parts}/${sha256}.partial`) ?? 0;
    return left > size ? 0 : left;
  }

  /** Bring all files to `parts`, each under its SHA-256. Disk and network are asked before the first byte moves. */
  async fetch(wanted, parts, installed = null) {
    this.files.makeFolder(parts);
    const digests = new Set([...wanted.values()].map((entry) => entry.sha256));
    for (const name of this.files.list(parts)) {
      if (!digests.has(name.replace(/\.partial$/, ""))) this.files.remove(`${parts}/${name}`); // of a superseded release
    }
    const planned = this.plan(wanted, parts, installed);
    let copied = 0;
    for (const path of planned.copies.values()) copied += this.files.size(path);
    const [needed, free] = [planned.download + copied, this.files.free(parts)];
    if (free < needed) throw new FetchError("disk", `${needed} bytes are needed, ${free} are free: free ${needed - free} more`);
    this.left = planned.download;
    this.allow();
    for (const [sha256, path] of planned.copies) this.files.copy(path, `${parts}/${sha256}`);
    for (const [name, entry] of [...wanted].sort(([one], [other]) => (one < other ? -1 : 1))) await this.part(name, entry, parts);
    return planned;
  }

  /** Refuse to go on where the network costs money and the user did not agree to so much. */
  allow() {
    if (this.left > this.metered_bytes && this.metered()) {
      throw new FetchError("metered", `${this.left} bytes are left, ${this.metered_bytes} are allowed over a metered network`);
    }
  }

  async part(name, { size, sha256 }, parts) {
    const [whole, partial] = [`${parts}/${sha256}`, `${parts}/${sha256}.partial`];
    if (this.files.size(whole) !== null) return;
    const resumed = this.kept(parts, sha256, size);
    if (resumed === 0) this.files.remove(partial);
    let actual = await this.append(partial, sha256, size);
    if (actual !== sha256 && resumed > 0) {
      this.files.remove(partial); // what an earlier run left was wrong: once more from the first byte
      this.left += size;
      actual = await this.append(partial, sha256, size);
    }
    if (actual !== sha256) {
      this.files.remove(partial);
      throw new FetchError("wrong-bytes", `${name}: expected sha256 ${sha256}, got ${actual}; none of it was kept`);
    }
    this.files.move(partial, whole);
  }

  /** Complete the file `partial`; the SHA-256 of all its bytes. */
  async append(partial, sha256, size) {
    const file = this.files.append(partial);
    try {
      for await (const chunk of this.stream(blob(sha256), file.size, size, () => this.allow())) {
        file.write(chunk);
        this.left -= chunk.length;
        this.progress(chunk.length);
      }
    } catch (error) {
      if (error.kind === "wrong-size") this.files.remove(partial);
      throw error;
    } finally {
      file.close();
    }
    return file.digest();
  }
}
