// Who answers, device or cloud: the first rule that holds decides. The table of pipeline/serve/hybrid, for an app.

const HEATS = ["nominal", "fair", "serious", "critical"];

const offline = ({ situation, limits }) =>
  situation.network === "none" || (situation.network === "metered" && !limits.metered);
const drained = ({ situation, limits }) =>
  situation.battery !== null && situation.battery < limits.battery && !situation.charging;
const hot = ({ situation, limits }) => HEATS.indexOf(situation.heat) >= HEATS.indexOf(limits.heat);
const ready = ({ situation }) => situation.device_ready;
const mode = (name) => (request) => request.mode === name;

/** LOW below `limits.low` tokens, HIGH above `limits.high`. */
function level({ tokens, limits }) {
  if (tokens < limits.low) return "LOW";
  return tokens > limits.high ? "HIGH" : "MEDIUM";
}

/** name, when it holds, who is asked first (null: nobody, a refusal), who then. */
const RULES = [
  ["private_only_cloud", (r) => r.private && mode("only_cloud")(r), null, null],
  ["private_no_device", (r) => r.private && !ready(r), null, null],
  ["private", (r) => r.private, "device", null],
  ["only_cloud_offline", (r) => mode("only_cloud")(r) && offline(r), null, null],
  ["only_cloud", mode("only_cloud"), "cloud", null],
  ["no_device", (r) => mode("only_device")(r) && !ready(r), null, null],
  ["only_device", mode("only_device"), "device", null],
  ["nobody", (r) => offline(r) && !ready(r), null, null],
  ["offline", offline, "device", null],
  ["device_not_ready", (r) => !ready(r), "cloud", null],
  ["prefer_cloud", mode("prefer_cloud"), "cloud", "device"],
  ["heat", hot, "cloud", "device"],
  ["battery", drained, "cloud", "device"],
  ["low", (r) => level(r) === "LOW", "device", "cloud"],
  ["high", (r) => level(r) === "HIGH", "cloud", "device"],
  ["turns", (r) => r.turns > r.limits.turns, "cloud", "device"],
  ["threshold", (r) => r.tokens > r.limits.threshold, "cloud", "device"],
  ["short", () => true, "device", "cloud"],
];

/**
 * { rule, first, then, level } for a request { mode, tokens, turns, private, situation, limits }.
 *
 * situation: network (none, metered, unmetered), battery (a share or null), charging, heat (nominal to critical: the
 * step's name), device_ready. limits: low, high, threshold (tokens), turns, battery, heat, metered (whether such a network
 * may be used).
 */
export function decide(request) {
  const [rule, , first, then] = RULES.find(([, holds]) => holds(request));
  return { rule, first, then, level: level(request) };
}

/** Whether a tag keeps a request on the device; one that `known` lacks does: a misspelt tag must not leak. */
export const isPrivate = (tags, known) => tags.some((tag) => !Object.hasOwn(known, tag) || known[tag] === "device");

/** Whether an answer whose first `tokens` had these log-probabilities (nats) is doubted; of none, it is not. */
export function doubts(logprobs, tokens, threshold) {
  const first = logprobs.slice(0, tokens);
  return first.length > 0 && first.reduce((sum, one) => sum + one, 0) / first.length < threshold;
}
