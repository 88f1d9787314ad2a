// Is this bundle what its maker signed, and may this app take it now? Copy this file and strict-json.mjs.
//
// Node 20 or later and nothing else. The order is the defence: names, then the signature over the bytes as they lie,
// with pinned keys, then every file's SHA-256, and only then is release.json read, from bytes whose digest was signed.
// docs/trust.md says what an app must pin and remember; vectors.mjs runs the test vectors. A field of release.json that
// this file does not know is ignored: raise min_app_version when an app must know it.

import crypto from "node:crypto";
import fs from "node:fs";
import path from "node:path";
import { NotJson, parseStrictJson } from "./strict-json.mjs";

const SMALL = 16 * 1024 * 1024; // bytes; no signature or document comes near it
const CHUNK = 1024 * 1024;
const CLOCK_SKEW = 24 * 3600 * 1000; // milliseconds that two honest clocks may differ by
const CONTENT = "content";
const SIGNATURE = "model.sig";
const DOCUMENTS = { bundle: ["release.json", "refusal.json"], tiers: ["tiers.json"] };
const PAYLOAD_TYPE = "application/vnd.in-toto+json";

/** Malformed input; its message becomes a finding. */
class Malformed extends Error {}

/** A signature that proves nothing; `kind` says why. */
class Unproven extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

// --- checks of parsed JSON -------------------------------------------------------------------------------------------

const text = (value) => typeof value === "string";
const matches = (pattern) => (value) => text(value) && pattern.test(value);
const is = (...allowed) => (value) => allowed.includes(value);
const integer = (least) => (value) => typeof value === "number" && value >= least;
const optional = (check) => (value) => value === undefined || value === null || check(value);
const listOf = (check, least = 0) => (value) => Array.isArray(value) && value.length >= least && value.every(check);
const sha256 = matches(/^[0-9a-f]{64}$/);
const name = matches(/^[a-z0-9][a-z0-9_-]{0,39}$/);
const fileName = matches(/^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$/);

function time(value) {
  if (!text(value) || !/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/.test(value)) return false;
  const moment = new Date(value);
  return !Number.isNaN(moment.getTime()) && moment.toISOString() === value.replace("Z", ".000Z");
}

/** An object's members, checked one by one; with `exact`, no others are allowed. Returns a plain object. */
function members(value, checks, where, exact = true) {
  if (!(value instanceof Map)) throw new Malformed(`${where} is not an object`);
  for (const key of exact ? value.keys() : []) {
    if (!Object.hasOwn(checks, key)) throw new Malformed(`${where}: unknown field ${JSON.stringify(key)}`);
  }
  for (const [key, check] of Object.entries(checks)) {
    if (!check(value.get(key))) throw new Malformed(`${where}: ${key} is missing or not valid`);
  }
  return Object.fromEntries(Object.keys(checks).map((key) => [key, value.get(key)]));
}

const object = (value) => value instanceof Map;

// --- the signature ---------------------------------------------------------------------------------------------------

const hash = (bytes) => crypto.createHash("sha256").update(bytes).digest("hex");

function base64(value, what) {
  const bytes = Buffer.from(value, "base64");
  if (bytes.toString("base64") !== value) throw new Malformed(`its ${what} is not base64`);
  return bytes;
}

/** A pinned key: base64 of the DER SubjectPublicKeyInfo of a P-256 key, as in its PEM file. */
function pinnedKey(encoded) {
  const der = Buffer.from(encoded, "base64");
  const key = crypto.createPublicKey({ key: der, format: "der", type: "spki" });
  if (key.asymmetricKeyType !== "ec" || key.asymmetricKeyDetails.namedCurve !== "prime256v1") {
    throw new TypeError("a pinned key is not on P-256");
  }
  const lines = der.toString("base64").match(/.{1,64}/g).join("\n");
  const pem = `-----BEGIN PUBLIC KEY-----\n${lines}\n-----END PUBLIC KEY-----\n`;
  return { key, id: hash(der), hint: hash(pem) };
}

function readEnvelope(raw) {
  const file = members(
    parseStrictJson(raw),
    { mediaType: is("application/vnd.dev.sigstore.bundle.v0.3+json"), verificationMaterial: object, dsseEnvelope: object },
    "the file",
  );
  const noEntries = (value) => Array.isArray(value) && value.length === 0;
  const material = members(file.verificationMaterial, { publicKey: object, tlogEntries: noEntries }, "the material");
  const { hint } = members(material.publicKey, { hint: sha256 }, "the public key");
  const one = (value) => Array.isArray(value) && value.length === 1;
  const envelope = members(file.dsseEnvelope, { payload: text, payloadType: is(PAYLOAD_TYPE), signatures: one }, "it");
  const proof = members(envelope.signatures[0], { sig: text, keyid: text }, "the signature");
  return {
    hint,
    keyid: proof.keyid,
    payload: base64(envelope.payload, "payload"),
    signature: base64(proof.sig, "signature"),
  };
}

/** DSSE's pre-authentication encoding: the bytes that are signed. */
function pae(payload) {
  return Buffer.concat([Buffer.from(`DSSEv1 ${PAYLOAD_TYPE.length} ${PAYLOAD_TYPE} ${payload.length} `), payload]);
}

/**
 * The digests (file name → SHA-256) of a signature's bytes, once a pinned key has signed them: what to fetch next.
 * Throws for a signature that proves nothing.
 */
export function openSignature(raw, pinnedKeys) {
  return readStatement(authenticate(raw, pinnedKeys.map(pinnedKey)).payload);
}

/** The pinned key that signed, and the statement's bytes, unread. */
function authenticate(raw, pinned) {
  const envelope = readEnvelope(raw);
  const message = pae(envelope.payload);
  const signer = pinned.find((pin) => crypto.verify("sha256", message, pin.key, envelope.signature));
  if (signer === undefined) {
    const known = pinned.some((pin) => pin.id === envelope.keyid);
    if (!known) throw new Unproven("other-key", `signed with the key ${JSON.stringify(envelope.keyid)}, which is not pinned`);
    throw new Unproven("invalid-signature", `it names the key ${envelope.keyid}, but that key did not sign this statement`);
  }
  if (envelope.keyid !== signer.id || envelope.hint !== signer.hint) {
    throw new Malformed(`the key ${signer.id} signed it, but it names another (its label was changed)`);
  }
  return { signer: signer.id, payload: envelope.payload };
}

/** The signed digests, file name → SHA-256, of an authenticated statement. */
function readStatement(payload) {
  const statement = members(
    parseStrictJson(payload),
    {
      _type: is("https://in-toto.io/Statement/v1"),
      subject: (value) => Array.isArray(value) && value.length === 1,
      predicateType: is("https://model_signing/signature/v1.0"),
      predicate: object,
    },
    "the signed statement",
  );
  const subject = members(statement.subject[0], { name: text, digest: object }, "the subject");
  const root = members(subject.digest, { sha256 }, "the subject's digest").sha256;
  const predicate = members(statement.predicate, { serialization: object, resources: listOf(object, 1) }, "the predicate");
  members(
    predicate.serialization,
    { method: is("files"), hash_type: is("sha256"), allow_symlinks: is(false) },
    "the serialization",
  );
  const digests = new Map();
  const folded = new Set();
  const all = crypto.createHash("sha256");
  for (const resource of predicate.resources) {
    const entry = members(resource, { name: fileName, algorithm: is("sha256"), digest: sha256 }, "a resource");
    if (folded.has(entry.name.toLowerCase())) throw new Malformed(`two signed names are ${entry.name}, but for case`);
    folded.add(entry.name.toLowerCase());
    digests.set(entry.name, entry.digest);
    all.update(Buffer.from(entry.digest, "hex"));
  }
  if (all.digest("hex") !== root) throw new Malformed("the root digest is not that of the files");
  return digests;
}

// --- the signed document ---------------------------------------------------------------------------------------------

const FORMAT = 2;
const STAMP = {
  model: name,
  release: integer(1),
  channel: is("development", "release"),
  created: time,
  expires: time,
  min_app_version: integer(0),
  max_app_version: (value) => value === null || integer(Number.MIN_SAFE_INTEGER)(value),
  key: object,
  next_key_id: optional(sha256),
};
const FORMS = {
  "release.json": { kind: is(undefined, "release"), variant: name, tiers: object, files: object },
  "refusal.json": { kind: is(undefined, "refusal"), variant: name, reasons: listOf(text, 1) },
  "tiers.json": { kind: is(undefined, "tiers"), tiers: object },
};

function readDocument(raw, documentName) {
  const parsed = parseStrictJson(raw);
  if (object(parsed) && parsed.get("format") !== FORMAT) {
    throw new Malformed(`it is of format ${parsed.get("format") ?? 1}; this verifier reads ${FORMAT}: fetch a release made for it`);
  }
  const document = members(parsed, { ...STAMP, ...FORMS[documentName] }, "it", false);
  document.key = members(document.key, { id: sha256, kind: is("development", "release") }, "key");
  document.tiers = [...(document.tiers?.keys() ?? [])];
  const files = new Map();
  for (const [file, entry] of document.files ?? []) {
    if (!fileName(file)) throw new Malformed(`files: ${JSON.stringify(file)} is no file name`);
    files.set(file, members(entry, { size: integer(0), sha256 }, `files: ${file}`));
  }
  if (documentName === "release.json" && files.size === 0) throw new Malformed("it lists no files");
  document.files = files;
  document.fields = parsed;
  return document;
}

// --- the folder ------------------------------------------------------------------------------------------------------

/** Open a file seen to be regular; a symlink put in its place meanwhile is an error, not followed. */
function open(file) {
  const { O_RDONLY, O_NOFOLLOW = 0, O_NONBLOCK = 0 } = fs.constants;
  return fs.openSync(file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
}

/** Call `use` with each chunk of at most a mebibyte. */
function readChunks(file, use) {
  const descriptor = open(file);
  try {
    const buffer = Buffer.allocUnsafe(CHUNK);
    for (let count; (count = fs.readSync(descriptor, buffer, 0, CHUNK, null)) > 0; ) use(buffer.subarray(0, count));
  } finally {
    fs.closeSync(descriptor);
  }
}

function hashFile(file) {
  const digest = crypto.createHash("sha256");
  readChunks(file, (chunk) => digest.update(chunk));
  return digest.digest("hex");
}

/** All bytes; empty if there are more than any signature or document has, which is then malformed. */
function readSmall(file) {
  if (fs.lstatSync(file).size > SMALL) return Buffer.alloc(0);
  const chunks = [];
  readChunks(file, (chunk) => chunks.push(Buffer.from(chunk)));
  return Buffer.concat(chunks);
}

const shown = (file) => (/^[\x20-\x7e]*$/.test(file) ? file : JSON.stringify(file).replace(/[^\x20-\x7e]/g, "?"));

// --- the whole -------------------------------------------------------------------------------------------------------

class Verification {
  constructor(folder, expected) {
    this.folder = folder;
    this.expected = expected;
    this.findings = [];
    this.signer = null;
    this.document = null;
  }

  found(kind, file, message) {
    this.findings.push({ kind, file: shown(file), message });
  }

  /** True, and a finding, if the entry is a symlink or not of the wanted type. */
  odd(entry, file, wanted = "isFile") {
    const stat = fs.lstatSync(entry);
    if (stat.isSymbolicLink()) this.found("symlink", file, "it is a symlink; a bundle holds none");
    else if (!stat[wanted]()) this.found("not-a-file", file, `expected a ${wanted === "isFile" ? "regular file" : "folder"}`);
    else return false;
    return true;
  }

  /** Whether the two entries of a bundle are there; whatever lies beside them is a finding. */
  layout() {
    const names = fs.readdirSync(this.folder);
    for (const entry of names) {
      if (entry !== CONTENT && entry !== SIGNATURE) this.found("unlisted", entry, "no signature covers it");
    }
    let whole = true;
    if (!names.includes(SIGNATURE)) this.found("missing-signature", SIGNATURE, "nothing in this bundle is proven");
    if (!names.includes(CONTENT)) this.found("missing", CONTENT, "the bundle has no content folder");
    for (const [entry, wanted] of [[SIGNATURE, "isFile"], [CONTENT, "isDirectory"]]) {
      if (!names.includes(entry) || this.odd(path.join(this.folder, entry), entry, wanted)) whole = false;
    }
    return whole;
  }

  run(pinned) {
    if (!this.layout()) return;
    try {
      const { signer, payload } = authenticate(readSmall(path.join(this.folder, SIGNATURE)), pinned);
      this.signer = signer;
      this.digests = readStatement(payload);
    } catch (error) {
      if (error instanceof Unproven) this.found(error.kind, SIGNATURE, error.message);
      else if (error instanceof Malformed || error instanceof NotJson) {
        this.found("malformed-signature", SIGNATURE, error.message);
      } else throw error;
      return;
    }
    this.sizes = new Map();
    const named = DOCUMENTS[this.expected.kind].filter((document) => this.digests.has(document));
    if (named.length === 1) this.readSigned(named[0]);
    else this.found("malformed-document", CONTENT, `expected one document, found ${named.length}: this is something else`);
    this.content();
    if (this.document !== null) this.judge(`${CONTENT}/${named[0]}`, named[0]);
  }

  /** Read a document from bytes that have the signed digest. Others are reported when files are compared. */
  readSigned(documentName) {
    const file = path.join(this.folder, CONTENT, documentName);
    if (!fs.lstatSync(file, { throwIfNoEntry: false })?.isFile()) return;
    const raw = readSmall(file);
    if (hash(raw) !== this.digests.get(documentName)) return;
    try {
      this.document = readDocument(raw, documentName);
      for (const [listed, entry] of this.document.files) this.sizes.set(listed, entry.size);
    } catch (error) {
      if (!(error instanceof Malformed || error instanceof NotJson)) throw error;
      this.found("malformed-document", `${CONTENT}/${documentName}`, error.message);
    }
  }

  /** Other sizes than the listed ones are not worth the time that hashing takes. */
  mayBeListed(size) {
    return this.sizes.size === 0 || [...this.sizes.values()].includes(size);
  }

  content() {
    const content = path.join(this.folder, CONTENT);
    const present = new Set(fs.readdirSync(content));
    const missing = [...this.digests.keys()].filter((file) => !present.has(file)).sort();
    const strangers = new Set([...present].filter((file) => !this.digests.has(file)).sort());
    const moved = missing.length > 0 ? this.hashStrangers(content, strangers) : new Map();
    for (const file of missing) {
      const digest = this.digests.get(file);
      if (moved.has(digest)) {
        this.found("renamed", `${CONTENT}/${file}`, `it is here as ${shown(moved.get(digest))}, with the same sha256`);
        strangers.delete(moved.get(digest));
      } else this.found("missing", `${CONTENT}/${file}`, `expected sha256 ${digest}, found no such file`);
    }
    for (const file of strangers) this.stranger(content, file);
    for (const file of this.digests.keys()) {
      const entry = path.join(content, file);
      if (present.has(file) && !this.odd(entry, `${CONTENT}/${file}`)) this.file(entry, file);
    }
  }

  hashStrangers(content, strangers) {
    const moved = new Map();
    for (const file of strangers) {
      const stat = fs.lstatSync(path.join(content, file), { throwIfNoEntry: false });
      if (stat?.isFile() && this.mayBeListed(stat.size)) moved.set(hashFile(path.join(content, file)), file);
    }
    return moved;
  }

  stranger(content, file) {
    const stat = fs.lstatSync(path.join(content, file), { throwIfNoEntry: false }); // absent: a name that is no text
    const what = stat?.isDirectory() ? "a folder" : "a file";
    if (stat !== undefined && !stat.isDirectory() && this.odd(path.join(content, file), `${CONTENT}/${file}`)) return;
    this.found("extra", `${CONTENT}/${file}`, `${what} that the signature does not cover`);
  }

  file(entry, file) {
    const { size } = fs.lstatSync(entry);
    const listed = this.sizes.get(file);
    const digest = this.digests.get(file);
    const worthHashing = size <= SMALL || (!Object.hasOwn(FORMS, file) && this.mayBeListed(size));
    const actual = worthHashing ? hashFile(entry) : null;
    if (actual === digest && (listed === undefined || listed === size)) return;
    const other = [...this.digests].find(([, signed]) => signed === actual);
    const where = `${CONTENT}/${file}`;
    if (actual !== digest && other !== undefined) this.found("exchanged", where, `it holds the bytes of ${other[0]}`);
    else if (listed !== undefined && size < listed) this.found("truncated", where, `expected ${listed} bytes, found ${size}`);
    else if (listed !== undefined && size > listed) this.found("extended", where, `expected ${listed} bytes, found ${size}`);
    else this.found("modified", where, `expected sha256 ${digest}, found ${actual}`);
  }

  /** Findings about a document that is proven: whether this app wants it, and now. */
  judge(file, documentName) {
    const { document, expected } = this;
    this.judgeKey(file, document, expected);
    const now = expected.now.getTime();
    if (now >= Date.parse(document.expires)) this.found("expired", file, `it expired on ${document.expires}`);
    if (now + CLOCK_SKEW < Date.parse(document.created)) {
      this.found("not-yet-valid", file, `it was created on ${document.created}, after this clock's time`);
    }
    if (document.release < (expected.highestRelease ?? 0)) {
      this.found("downgraded", file, `expected release ${expected.highestRelease} or later, found ${document.release}`);
    }
    const { min_app_version: least, max_app_version: most } = document;
    if (expected.appVersion != null && (expected.appVersion < least || (most !== null && expected.appVersion > most))) {
      this.found("app-version", file, `it is for app versions ${least} to ${most ?? "any"}`);
    }
    for (const field of ["model", "variant"]) {
      if (expected[field] != null && document[field] !== expected[field]) {
        this.found("swapped", file, `expected ${field} ${expected[field]}, found ${document[field]}`);
      }
    }
    if (expected.tier != null && documentName !== "refusal.json" && !document.tiers.includes(expected.tier)) {
      this.found("swapped-tier", file, `expected tier ${expected.tier}, but it is for ${document.tiers.join(", ") || "none"}`);
    }
    this.judgeFiles(file, documentName);
    if (documentName === "refusal.json") this.found("refusal", file, `it was refused: ${document.reasons.join("; ")}`);
  }

  judgeKey(file, document, expected) {
    if (document.key.id !== this.signer) this.found("disagrees", file, `it names the key ${document.key.id}`);
    const developmentKey = document.key.kind === "development";
    if (developmentKey && document.channel === "release") {
      this.found("development-key", file, "channel release was signed with a development key");
    } else if ((developmentKey || document.channel === "development") && !expected.allowDevelopment) {
      this.found("development-key", file, "expected a release, found a development bundle");
    }
  }

  judgeFiles(file, documentName) {
    const { files } = this.document;
    for (const listed of files.keys()) {
      if (!this.digests.has(listed) || listed === documentName) this.found("disagrees", file, `${listed} is not signed`);
    }
    for (const [signed, digest] of this.digests) {
      if (signed === documentName) continue;
      const entry = files.get(signed);
      if (entry === undefined) this.found("disagrees", file, `it does not list ${signed}`);
      else if (entry.sha256 !== digest) this.found("disagrees", file, `another sha256 of ${signed} was signed`);
    }
  }
}

/**
 * Check a bundle folder (`content/` and `model.sig`). Nothing in it may be used unless `ok` is true; then store
 * `document.release` as the model's highest.
 *
 * options: pinnedKeys (base64 DER SubjectPublicKeyInfo of P-256 keys: current and next), now (Date), highestRelease
 * (number or null), allowDevelopment, appVersion, tier, model, variant (null: not asked), kind ("bundle" or "tiers").
 * Returns { ok, signer, document, findings: [{ kind, file, message }] }; `document.fields` is all that was read, as
 * strict-json.mjs reads it. Throws when a file cannot be read, or for a
 * pinned key that is none: that is no answer, so the bundle must not be used either.
 */
export function verifyBundle(folder, options) {
  const expected = { kind: "bundle", now: new Date(), allowDevelopment: false, ...options };
  const verification = new Verification(folder, expected);
  verification.run(expected.pinnedKeys.map(pinnedKey));
  const { findings, signer, document } = verification;
  return { ok: findings.length === 0, signer, document, findings };
}
