// What is installed, what may be, and what was the highest release: fetch, verify, install, update, remove.
//
//     ROOT/releases.json                  the highest release accepted of each subject, MODEL/VARIANT or MODEL for its tiers
//     ROOT/MODEL/VARIANT/                 the bundle in use: content/, model.sig
//     ROOT/MODEL/VARIANT.partial/         what an interrupted fetch left for the next
//
// Nothing is used before it is proven, and a bundle appears whole or not at all.

import { Fetcher, FetchError } from "./fetcher.mjs";
import { parseStrictJson, plain } from "./strict-json.mjs";

const SMALL = 16 * 1024 * 1024; // bytes; no signature or document comes near it
const SUBJECT = /^[a-z0-9_-]+(\/[a-z0-9_-]+)?$/;
const PREPACKED = "content/prepacked"; // made by the phone, so not part of what was signed

/** The state file is damaged, or a release is lower than one that was accepted. kind: unreadable, rollback. */
export class StateError extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** The highest release ever accepted of each subject. A missing file remembers nothing; a damaged one is an error. */
export class Releases {
  constructor(path, files) {
    this.path = path;
    this.files = files;
  }

  read() {
    const raw = this.files.read(this.path);
    if (raw === null) return {};
    try {
      const { releases, ...others } = plain(parseStrictJson(raw));
      const sound = ([subject, release]) => SUBJECT.test(subject) && Number.isSafeInteger(release);
      if (Object.keys(others).length === 0 && Object.entries(releases).every(sound)) return releases;
    } catch {} // not JSON, or no object
    throw new StateError("unreadable", `${this.path} is no record of releases: without it a rollback cannot be seen`);
  }

  highest(subject) {
    return this.read()[subject] ?? null;
  }

  record(subject, release) {
    const releases = this.read();
    const known = releases[subject] ?? release;
    if (release < known) throw new StateError("rollback", `release ${known} of ${subject} was accepted before, ${release} is a rollback`);
    if (releases[subject] !== release) {
      this.files.write(this.path, Buffer.from(`${JSON.stringify({ releases: { ...releases, [subject]: release } })}\n`));
    }
  }
}

/** Bundles under one folder. `device` is node.mjs's: { files, place, verify, openSignature }. */
export class Library {
  /** asked: pinnedKeys, appVersion, allowDevelopment, now: what every signature is judged by. network: Fetcher's options. */
  constructor(root, device, asked, network = {}) {
    Object.assign(this, { root, asked, ...device });
    this.fetcher = new Fetcher(device.place, device.files, network);
    this.releases = new Releases(`${root}/releases.json`, device.files);
  }

  folder(model, variant) {
    return `${this.root}/${model}/${variant}`;
  }

  /** The newest signed tiers.json of a model: what `choose` reads. */
  async tiers(model) {
    const folder = `${this.root}/${model}/.tiers`;
    await this.layOut(folder, `tiers/${model}/latest.sig`, "tiers.json", null);
    const document = this.accept(folder, model, { model, kind: "tiers" });
    this.releases.record(model, document.release);
    return plain(document.fields);
  }

  /** Variants of a model that are here. */
  installed(model) {
    const whole = (name) => this.files.size(`${this.folder(model, name)}/model.sig`) !== null;
    return this.files.list(`${this.root}/${model}`).filter((name) => /^[a-z0-9]/.test(name) && !name.includes(".") && whole(name));
  }

  /**
   * Bring an option's bundle here, or up to date: what has not changed is copied, the rest is fetched. On any error
   * what was installed stays. Returns { folder, release, downloaded, reused } in bytes.
   */
  async install(model, option) {
    const { variant, release, signature_sha256: pin } = option;
    const [target, staging] = [this.folder(model, variant), `${this.folder(model, variant)}.partial`];
    this.recover(target);
    const bundle = `${staging}/bundle`;
    await this.layOut(bundle, `bundles/${model}/${variant}/${release}/model.sig`, "release.json", pin);
    const subject = `${model}/${variant}`;
    const { files } = this.accept(bundle, subject, { model, variant }, ["missing"]);
    const same = this.files.sha256(`${bundle}/model.sig`) === this.files.sha256(`${target}/model.sig`);
    if (same && this.verified(target, subject, { model, variant }).length === 0) return this.finish(target, subject, release, 0, 0);
    const { download, reused } = await this.fetcher.fetch(files, `${staging}/parts`, `${target}/content`);
    this.assemble(files, `${staging}/parts`, `${bundle}/content`);
    this.accept(bundle, subject, { model, variant });
    this.files.move(target, `${target}.old`);
    this.files.move(bundle, target);
    return this.finish(target, subject, release, download, reused);
  }

  /** Give an installed bundle's space back. Its highest release stays in the state: an older one remains a rollback. */
  remove(model, variant) {
    for (const end of ["", ".old", ".partial"]) this.files.remove(`${this.folder(model, variant)}${end}`);
  }

  /** Fetch a signature and, by the digest that it proves, its document, into a folder of their own. */
  async layOut(folder, path, name, pin) {
    const signature = await this.fetcher.small(path, SMALL);
    if (pin !== null && this.files.digest(signature) !== pin) {
      throw new FetchError("not-accepted", `${path} is not the signature that tiers.json pins, ${pin}`);
    }
    let digest;
    try {
      digest = this.openSignature(signature, this.asked.pinnedKeys).get(name);
    } catch (error) {
      throw new FetchError("not-accepted", `${path}: ${error.message}`);
    }
    if (digest === undefined) throw new FetchError("not-accepted", `${path} signs no ${name}`);
    const raw = await this.fetcher.small(`blobs/sha256/${digest}`, SMALL);
    if (this.files.digest(raw) !== digest) throw new FetchError("wrong-bytes", `${path}: wrong bytes for ${name}`);
    this.files.remove(folder);
    this.files.write(`${folder}/model.sig`, signature);
    this.files.write(`${folder}/content/${name}`, raw);
  }

  /** Findings about a folder, but those of a `passing` kind, and what the phone itself prepared. */
  verified(folder, subject, wanted, passing = []) {
    const answer = this.verify(folder, { ...this.asked, ...wanted, highestRelease: this.releases.highest(subject) });
    this.document = answer.document;
    return answer.findings.filter(({ kind, file }) => !passing.includes(kind) && file !== PREPACKED);
  }

  accept(folder, subject, wanted, passing = []) {
    const findings = this.verified(folder, subject, wanted, passing);
    if (findings.length === 0 && this.document !== null) return this.document;
    throw new FetchError("not-accepted", findings.map(({ kind, file, message }) => `${kind}: ${file}: ${message}`).join("; "));
  }

  /** Parts under their names. (Android denies hard links, so a part is moved, and copied only where two names share it.) */
  assemble(files, parts, content) {
    const uses = new Map();
    for (const [name, { sha256 }] of files) uses.set(sha256, [...(uses.get(sha256) ?? []), name]);
    for (const [sha256, [first, ...others]] of uses) {
      for (const name of others) this.files.copy(`${parts}/${sha256}`, `${content}/${name}`);
      this.files.move(`${parts}/${sha256}`, `${content}/${first}`);
    }
  }

  /** Put back what a run moved aside that was killed between two renames. */
  recover(target) {
    if (this.files.size(`${target}/model.sig`) === null) this.files.move(`${target}.old`, target);
    this.files.remove(`${target}.old`);
  }

  finish(target, subject, release, downloaded, reused) {
    this.releases.record(subject, release);
    for (const end of [".old", ".partial"]) this.files.remove(`${target}${end}`);
    return { folder: target, release, downloaded, reused };
  }
}
