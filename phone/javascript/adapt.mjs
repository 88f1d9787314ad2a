// How hard may the phone work now? Heat decides the step; a step says threads, chunk, length of an answer and pauses.
//
// ../profile.json holds the thresholds and the steps. A reading at a threshold raises the step at once; it falls only when
// the reading is more than the hysteresis below, so that it does not swing between two steps.

/** The step after a reading; the same step where there is none (null, NaN). */
export function nextStep(step, reading, { from, hysteresis }) {
  if (reading === null || reading === undefined || Number.isNaN(reading)) return step;
  const reached = from.filter((threshold) => reading >= threshold).length;
  const kept = from.filter((threshold) => reading + hysteresis >= threshold).length;
  return Math.max(reached, Math.min(step, kept));
}

/** What a step leaves of a way: threads and chunk when a model is loaded, tokens of an answer, milliseconds between tokens. */
export function settings({ threads_percent, prefill_chunk, answer_tokens, pause_ms }, way) {
  return {
    threads: Math.max(1, Math.ceil((way.threads * threads_percent) / 100)),
    prefill_chunk: Math.min(way.prefill_chunk, prefill_chunk),
    answer_tokens: Math.min(way.context, answer_tokens ?? Infinity),
    pause_ms,
  };
}

/** Follows a phone's sensors; the one that is worst decides. */
export class Governor {
  constructor(profile, way) {
    this.profile = profile;
    this.way = way;
    this.steps = Object.fromEntries(Object.keys(profile.sensors).map((sensor) => [sensor, 0]));
  }

  /** readings: by the sensor's name, such as { celsius: 36.5 }. */
  observe(readings) {
    for (const [sensor, rule] of Object.entries(this.profile.sensors)) {
      this.steps[sensor] = nextStep(this.steps[sensor], readings[sensor], rule);
    }
    return this.step;
  }

  get step() {
    return Math.max(...Object.values(this.steps));
  }

  get settings() {
    return settings(this.profile.steps[this.step], this.way);
  }
}
