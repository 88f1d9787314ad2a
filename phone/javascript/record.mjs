// What a phone saw under sustained load: docs/schemas/sustained.schema.json, written for `python -m pipeline sustain --import`.

/** Collects samples while an answer is generated. */
export class SustainedLoad {
  /** subject: device, system, model, variant, release, way, runtime, started, cold_start_seconds, warm_start_seconds. */
  constructor(subject) {
    this.subject = subject;
    this.samples = [];
  }

  /**
   * One look: seconds since the start, tokens written since the last look, step, and what the system shows (null: it
   * does not): private_bytes, mapped_bytes, celsius, headroom, thermal_state, hertz.
   */
  sample(look) {
    const unknown = { private_bytes: null, mapped_bytes: null, celsius: null, headroom: null, thermal_state: null, hertz: null };
    this.samples.push({ ...unknown, ...look });
  }

  toJSON() {
    return { format: 1, kind: "sustained", ...this.subject, samples: this.samples };
  }
}
