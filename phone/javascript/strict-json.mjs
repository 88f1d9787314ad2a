// JSON that can be read in one way only: UTF-8, no object with a key twice, nesting bounded. Objects become Maps,
// integers Numbers; a number with a fraction, an exponent or more than 2^53 becomes a Decimal, which is no integer.

const MAX_DEPTH = 64;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };

/** Bytes that are not such JSON. */
export class NotJson extends Error {}

/** A number that is no integer of ours. */
export class Decimal {
  constructor(text) {
    this.text = text;
  }
}

class Parser {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  fail(what) {
    throw new NotJson(`${what} at character ${this.at}`);
  }

  space() {
    while (" \t\n\r".includes(this.text.charAt(this.at)) && this.at < this.text.length) this.at += 1;
  }

  /** Skip space; if `token` follows, step over it. */
  take(token) {
    this.space();
    if (!this.text.startsWith(token, this.at)) return false;
    this.at += token.length;
    return true;
  }

  expect(token) {
    if (!this.take(token)) this.fail(`expected ${token}`);
  }

  value(depth) {
    if (depth > MAX_DEPTH) this.fail("nested too deeply");
    if (this.take("{")) return this.object(depth);
    if (this.take("[")) return this.array(depth);
    if (this.take('"')) return this.string();
    if (this.take("true")) return true;
    if (this.take("false")) return false;
    if (this.take("null")) return null;
    return this.number();
  }

  object(depth) {
    const members = new Map();
    if (this.take("}")) return members;
    do {
      this.expect('"');
      const key = this.string();
      if (members.has(key)) this.fail(`the key ${JSON.stringify(key)} stands twice in one object`);
      this.expect(":");
      members.set(key, this.value(depth + 1));
    } while (this.take(","));
    this.expect("}");
    return members;
  }

  array(depth) {
    const items = [];
    if (this.take("]")) return items;
    do items.push(this.value(depth + 1));
    while (this.take(","));
    this.expect("]");
    return items;
  }

  string() {
    let result = "";
    for (;;) {
      PLAIN.lastIndex = this.at;
      const plain = PLAIN.exec(this.text)[0];
      result += plain;
      this.at += plain.length;
      const next = this.text.charAt(this.at);
      this.at += 1;
      if (next === '"') break;
      if (next !== "\\") this.fail("a string that does not end");
      result += this.escape();
    }
    if (!result.isWellFormed()) this.fail("half a character");
    return result;
  }

  escape() {
    const letter = this.text.charAt(this.at);
    this.at += 1;
    if (letter !== "u") return ESCAPES[letter] ?? this.fail("an unknown escape");
    const digits = this.text.slice(this.at, this.at + 4);
    if (!/^[0-9a-fA-F]{4}$/.test(digits)) this.fail("an unknown escape");
    this.at += 4;
    return String.fromCharCode(parseInt(digits, 16));
  }

  number() {
    NUMBER.lastIndex = this.at;
    const match = NUMBER.exec(this.text);
    if (match === null) this.fail("expected a value");
    this.at += match[0].length;
    const value = Number(match[0]);
    return match[1] || match[2] || !Number.isSafeInteger(value) ? new Decimal(match[0]) : value;
  }
}

/** Parse bytes; throws NotJson. */
export function parseStrictJson(bytes) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new NotJson("it is not UTF-8");
  }
  const parser = new Parser(text);
  const value = parser.value(0);
  parser.space();
  if (parser.at !== text.length) parser.fail("more text after the value");
  return value;
}

/** What was parsed, as plain objects and numbers. */
export function plain(value) {
  if (value instanceof Map) return Object.fromEntries([...value].map(([key, member]) => [key, plain(member)]));
  if (value instanceof Decimal) return Number(value.text);
  return Array.isArray(value) ? value.map(plain) : value;
}
