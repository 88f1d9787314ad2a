// One answer, from this phone if it can, else from a cloud if the user's policy allows it, else a refusal with a reason.
//
// An engine is what runs a bundle, such as onnxruntime-genai behind { load(folder, overlay) }; what it loads is
// { start(prompt, settings), next() → text or null, close() }.

/**
 * Load the best option that is installed and fits: { model, option, tried }; model is null where none could be loaded,
 * and `tried` says why, [{ variant, weights, why: not-installed, memory, kernels, load-failed }].
 *
 * lacks(option) is asked before each, because loading changes what is free. prepare(option) gives the graph to load, null
 * where this processor cannot map the weights. load(option, graph) throws where it fails.
 */
export async function loadBest(options, { installed, lacks, prepare, load }) {
  const tried = [];
  for (const option of options) {
    const { variant, way } = option;
    const failed = (why, message = "") => tried.push({ variant, weights: way.weights, why, message });
    if (!installed.includes(variant)) failed("not-installed");
    else if (lacks(option) > 0) failed("memory", `${lacks(option)} bytes are missing`);
    else {
      try {
        const graph = way.weights === "mapped" ? await prepare(option) : undefined;
        if (graph === null) failed("kernels");
        else return { model: await load(option, graph), option, tried };
      } catch (error) {
        failed("load-failed", error.message);
      }
    }
  }
  return { model: null, option: null, tried };
}

/** What onnxruntime-genai's Config.overlay takes: the signed way, what heat leaves of it, and the mapped graph's name. */
export function overlay(way, settings, graph) {
  const { model: { decoder = {}, ...model } = {} } = way.genai ?? {};
  const session_options = { ...decoder.session_options, intra_op_num_threads: settings.threads };
  const file = graph === undefined ? {} : { filename: graph };
  const search = { ...way.genai?.search, chunk_size: settings.prefill_chunk };
  return { ...way.genai, model: { ...model, decoder: { ...decoder, session_options, ...file } }, search };
}

/**
 * Pieces of an answer, with a pause between them as heat demands. Returns how it ended: { tokens, ended: end, length,
 * heat }. heat() reads the sensors, pause(ms) waits, `most` is what the user asked for, in tokens.
 */
export async function* generate(model, prompt, governor, { heat, pause, most }) {
  governor.observe(heat());
  model.start(prompt, governor.settings);
  for (let tokens = 0; ; tokens += 1) {
    const { answer_tokens, pause_ms } = governor.settings;
    if (tokens >= most) return { tokens, ended: "length" };
    if (tokens >= answer_tokens) return { tokens, ended: "heat" };
    const piece = await model.next();
    if (piece === null) return { tokens, ended: "end" };
    yield piece;
    if (pause_ms > 0) await pause(pause_ms);
    governor.observe(heat());
  }
}

/**
 * Who answers: { by: device, cloud or nobody, option, tried, model, text }. A device's answer is still to be generated
 * with `model`. `cloud` is null where the policy forbids it.
 */
export async function answerOrFallBack(options, means, prompt, cloud) {
  const loaded = await loadBest(options, means);
  if (loaded.model !== null) return { by: "device", ...loaded, text: null };
  const refused = (why, message) => {
    const tried = [...loaded.tried, { variant: null, weights: null, why, message }];
    return { by: "nobody", ...loaded, tried, text: null };
  };
  if (cloud === null) return refused("cloud-forbidden", "the policy keeps this request on the phone");
  try {
    return { by: "cloud", ...loaded, text: await cloud(prompt) };
  } catch (error) {
    return refused("cloud-failed", error.message);
  }
}
