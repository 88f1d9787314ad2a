// Two variants answer the same chat, each with its own history. Needs nothing but this server.

const find = (id) => document.getElementById(id);
const SIDES = ["left", "right"];
const NONE = "";
let histories = { left: [], right: [] };
let running = null; // AbortController of the answers that are being written

const headers = () => ({
  "content-type": "application/json",
  ...(find("key").value ? { authorization: `Bearer ${find("key").value}` } : {}),
});

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// --- the server ------------------------------------------------------------------------------------------------------

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  find("door").hidden = response.status !== 401;
  if (!response.ok) throw new Error((await response.json()).error.message);
  const names = (await response.json()).data.map((model) => model.id);
  SIDES.forEach((side, place) => {
    const options = place ? [NONE, ...names] : names;
    find(side).replaceChildren(...options.map((name) => new Option(name || "nobody", name)));
    find(side).value = names[place] ?? NONE;
  });
}

async function* chunks(body, signal) {
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let rest = "";
  for await (const text of decoded(response.body)) {
    const events = (rest + text).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
  throw new Error("the connection ended before the answer did");
}

async function* decoded(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

// --- one answer ------------------------------------------------------------------------------------------------------

class Answer {
  constructor(model) {
    this.model = model;
    this.tokens = []; // {id, node}, in order
    this.box = element("article", "answer");
    this.text = element("div", "text");
    this.figures = element("p", "figures faint", "waits for its turn");
    this.box.append(element("h2", "", model), this.text, this.figures);
  }

  get content() {
    return this.text.textContent;
  }

  clear() {
    this.tokens = [];
    this.text.replaceChildren();
  }

  add(piece) {
    const node = element("span", "", piece.delta.content);
    this.text.append(node);
    this.times ??= { asked: this.asked, first: performance.now() };
    this.times.last = performance.now();
    const { content } = piece.delta;
    const ids = piece.token_ids?.length ? piece.token_ids : content ? [content] : []; // a cloud's pieces have no ids
    ids.forEach((id) => this.tokens.push({ id, node }));
    this.figures.textContent = this.describe();
  }

  describe(ending = "") {
    if (!this.times) return ending;
    const { asked, first, last } = this.times;
    const count = this.tokens.length;
    const seconds = (milliseconds) => (milliseconds / 1000).toFixed(1);
    const rate = count > 1 && last > first ? `, then ${((count - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s` : "";
    return [`${count} tokens: the first after ${seconds(first - asked)} s${rate}`, ending].filter(Boolean).join(" · ");
  }

  async write(body, signal) {
    this.asked = performance.now();
    let origin = null;
    let reason = null;
    for await (const chunk of chunks(body, signal)) {
      const last = chunk.choices.some((piece) => piece.finish_reason);
      if (chunk.x_origin && origin && !last) this.clear(); // somebody else answers anew
      origin = chunk.x_origin ?? origin;
      for (const piece of chunk.choices) {
        this.add(piece);
        reason = piece.finish_reason ?? reason;
      }
    }
    const cut = reason === "length" ? "cut at its limit" : "";
    const who = origin ? `answered by ${origin.who}: ${origin.why}` : "";
    this.figures.textContent = this.describe([cut, who].filter(Boolean).join(" · "));
  }

  fail(problem) {
    const stopped = problem.name === "AbortError";
    this.figures.textContent = this.describe(stopped ? "stopped" : problem.message);
    this.figures.classList.toggle("error", !stopped);
  }

  mark(place) {
    const token = this.tokens.slice(place).find(({ node }) => node.textContent); // a token may complete no character
    if (!token) return;
    const marked = element("mark", "", token.node.textContent);
    marked.title = `token ${place + 1}: the first that differs`;
    if (!marked.textContent.trim()) marked.dataset.blank = marked.textContent.includes("\n") ? "⏎" : "␣";
    token.node.replaceChildren(marked);
  }
}

/** Number of tokens in which two answers agree from the start. */
function agreement(one, other) {
  const most = Math.min(one.tokens.length, other.tokens.length);
  for (let place = 0; place < most; place++) if (one.tokens[place].id !== other.tokens[place].id) return place;
  return most;
}

function compare(answers, verdict) {
  const [one, other] = answers;
  if (!one?.tokens.length || !other?.tokens.length) return;
  const agreed = agreement(one, other);
  const same = agreed === one.tokens.length && agreed === other.tokens.length;
  verdict.textContent = same ? `The same ${agreed} tokens.` : `The same ${agreed} tokens, then they differ.`;
  if (!same) answers.forEach((answer) => answer.mark(agreed));
}

// --- a turn ----------------------------------------------------------------------------------------------------------

async function answerOn(side, answer, signal) {
  const history = histories[side];
  const seed = find("seed").value;
  const body = {
    model: answer.model, messages: [...history], stream: true, return_token_ids: true,
    max_tokens: Number(find("tokens").value), temperature: Number(find("temperature").value),
    ...(seed ? { seed: Number(seed) } : {}),
  };
  try {
    await answer.write(body, signal);
  } catch (problem) {
    answer.fail(problem);
  }
  if (answer.content) history.push({ role: "assistant", content: answer.content });
  else history.pop(); // what got no answer was not asked
}

async function ask(message) {
  const sides = SIDES.filter((side) => find(side).value !== NONE);
  const answers = sides.map((side) => new Answer(find(side).value));
  const row = element("div", "answers");
  const verdict = element("p", "verdict faint");
  row.append(...answers.map((answer) => answer.box));
  find("turns").append(element("div", "question", message), row, verdict);
  sides.forEach((side) => histories[side].push({ role: "user", content: message }));
  row.previousSibling.scrollIntoView();
  // In turn, because the engine takes one at a time: the time to the first token is then the model's own.
  for (const [place, side] of sides.entries()) await answerOn(side, answers[place], running.signal);
  compare(answers, verdict);
  verdict.scrollIntoView({ block: "nearest" });
}

async function send() {
  const message = find("message").value.trim();
  if (running || !message || !find("settings").reportValidity()) return;
  running = new AbortController();
  busy(true);
  find("message").value = "";
  await ask(message);
  running = null;
  busy(false);
}

function busy(yes) {
  find("send").disabled = yes;
  find("stop").disabled = !yes;
  find("status").textContent = yes ? "Answering." : "";
  for (const control of find("settings").elements) control.disabled = yes;
}

function startAnew() {
  histories = { left: [], right: [] };
  find("turns").replaceChildren();
  find("message").focus();
}

async function enter() {
  try {
    await listModels();
    find("status").textContent = "";
    startAnew();
  } catch (problem) {
    find("status").textContent = problem.message;
  }
}

find("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
find("door").addEventListener("submit", (event) => { event.preventDefault(); enter(); });
find("settings").addEventListener("submit", (event) => event.preventDefault());
find("stop").addEventListener("click", () => running?.abort());
find("anew").addEventListener("click", startAnew);
SIDES.forEach((side) => find(side).addEventListener("change", startAnew));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === find("message")) {
    event.preventDefault();
    send();
  }
});
enter();
