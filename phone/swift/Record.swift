// What a phone saw under sustained load: docs/schemas/sustained.schema.json, for `python -m pipeline sustain --import`.

/// Collects samples while an answer is generated. subject: device, system, model, variant, release, way, runtime, started,
/// cold_start_seconds, warm_start_seconds.
struct SustainedLoad {
    private let subject: [String: StrictJSON]
    private var samples: [StrictJSON] = []

    init(_ subject: [String: StrictJSON]) {
        self.subject = subject
    }

    /// One look: seconds since the start, tokens written since the last look, step, and what the system shows (absent or
    /// null: it does not): private_bytes, mapped_bytes, celsius, headroom, thermal_state, hertz.
    mutating func sample(_ look: [String: StrictJSON]) {
        let names = ["private_bytes", "mapped_bytes", "celsius", "headroom", "thermal_state", "hertz"]
        let unknown = Dictionary(uniqueKeysWithValues: names.map { ($0, StrictJSON.null) })
        samples.append(.object(unknown.merging(look) { _, seen in seen }))
    }

    var json: String {
        let head: [String: StrictJSON] = ["format": .integer(1), "kind": .text("sustained"), "samples": .array(samples)]
        return StrictJSON.object(subject.merging(head) { _, own in own }).json
    }
}
