// Which variant does this phone run, in which way, with the memory that is free now? Read from the signed tiers.json.
//
// A class of devices has one decision in tiers.json. A phone may take its own class's and every lower one's, so a phone
// that is short of memory finds a lighter way of the same variant, or a smaller variant, or a refusal with the numbers.

const mapped = (option) => option.way.weights === "mapped";

/** Best first: the longest context, as the tiers were decided; then the lowest divergence; then what loads as it is. */
function byRank(one, other) {
  const keys = (option) => [-option.way.context, option.kl_mean, Number(mapped(option)), -option.way.prefill_chunk, option.need_bytes];
  const [left, right] = [keys(one), keys(other)];
  const at = left.findIndex((value, index) => value !== right[index]);
  return at < 0 ? 0 : left[at] - right[at];
}

function classes(tiers, device) {
  const decisions = Object.entries(tiers.tiers).map(([tier, decision]) => ({ tier, ...decision }));
  return decisions
    .filter((decision) => decision.platform === device.platform && decision.ram_bytes <= device.ram_bytes)
    .sort((one, other) => other.ram_bytes - one.ram_bytes);
}

/** Bytes that an option lacks on this phone now; zero or less where it fits. */
export function lacks(option, device) {
  const private_ = option.need_bytes - device.available_bytes;
  const together = option.need_bytes + option.mapped_bytes - (device.resident_bytes ?? Infinity);
  return Math.max(private_, together);
}

/**
 * All that the signed tiers allow this phone, best first, whatever memory is free: { tier, variant, way, need_bytes,
 * mapped_bytes, bundle_bytes, kl_mean, signature_sha256, release }.
 *
 * tiers: the document's fields as plain objects. device: { platform, ram_bytes, available_bytes (private memory that
 * the app may take now), resident_bytes (RAM for private and mapped memory together, null: not known), maps (whether
 * this processor is of a kernel class that the bundle names) }.
 */
export function ranked(tiers, device) {
  return classes(tiers, device)
    .filter((decision) => decision.decision === "bundle" && (device.maps || !mapped(decision)))
    .map((decision) => ({ ...decision, ...tiers.bundles[decision.variant] }))
    .sort(byRank);
}

function refuse(kind, missing_bytes, message) {
  return { option: null, refusal: { kind, missing_bytes, message } };
}

/** The best option that fits now, or why there is none: { option, refusal: { kind, missing_bytes, message } }. */
export function choose(tiers, device) {
  const [own] = classes(tiers, device);
  if (own === undefined) return refuse("no-class", null, `no class of devices begins at ${device.ram_bytes} bytes of RAM or below`);
  const options = ranked(tiers, device);
  if (options.length === 0) {
    const reasons = own.reasons ?? ["its weights have to be mapped, and this processor is of none of the bundle's kernel classes"];
    return refuse("refused", own.shortfall_bytes ?? null, `${own.tier}: ${reasons.join("; ")}`);
  }
  const option = options.find((one) => lacks(one, device) <= 0);
  if (option !== undefined) return { option, refusal: null };
  const nearest = options.reduce((best, one) => (lacks(one, device) < lacks(best, device) ? one : best));
  const needs = `${nearest.variant} with weights ${nearest.way.weights} needs ${nearest.need_bytes} bytes private and ${nearest.mapped_bytes} mapped`;
  return refuse("memory", lacks(nearest, device), `${needs}; ${device.available_bytes} bytes are free now`);
}
