// How hard may the phone work now? Heat decides the step; a step says threads, chunk, length of an answer and pauses.
//
// ../profile.json holds the thresholds and the steps. A reading at a threshold raises the step at once; it falls only when
// the reading is more than the hysteresis below, so that it does not swing between two steps.

/// What a step leaves of a way: threads and chunk when a model is loaded, tokens of an answer, milliseconds between tokens.
struct Settings: Equatable {
    let threads: Int64
    let prefillChunk: Int64
    let answerTokens: Int64
    let pauseMs: Int64
}

/// A sensor's thresholds, one for each step above the first, and its hysteresis, in its own unit.
struct Sensor {
    private let from: [Double]
    private let hysteresis: Double

    init(_ fields: StrictJSON) throws {
        from = try required(fields["from"]?.array, "from").map { try required($0.double, "from") }
        hysteresis = try required(fields["hysteresis"]?.double, "hysteresis")
    }

    /// The step after a reading; the same step where there is none (nil, NaN).
    func next(_ step: Int, _ reading: Double?) -> Int {
        guard let reading = reading, !reading.isNaN else { return step }
        let reached = from.filter { reading >= $0 }.count
        let kept = from.filter { reading + hysteresis >= $0 }.count
        return max(reached, min(step, kept))
    }
}

/// profile.json, as StrictJSON reads it.
struct Profile {
    private let steps: [StrictJSON]
    let sensors: [String: Sensor]

    init(_ fields: StrictJSON) throws {
        steps = try required(fields["steps"]?.array, "steps")
        sensors = try required(fields["sensors"]?.object, "sensors").mapValues { try Sensor($0) }
    }

    /// Such as `serious`: a word of the policy, too.
    func name(_ step: Int) -> String { steps[step]["name"]?.text ?? "" }

    func settings(_ step: Int, _ way: Way) -> Settings {
        func number(_ name: String, _ otherwise: Int64) -> Int64 { steps[step][name]?.integer ?? otherwise }
        return Settings(
            threads: max(1, (way.threads * number("threads_percent", 100) + 99) / 100),
            prefillChunk: min(way.prefillChunk, number("prefill_chunk", Int64.max)),
            answerTokens: min(way.context, number("answer_tokens", Int64.max)), pauseMs: number("pause_ms", 0))
    }
}

/// Follows a phone's sensors; the one that is worst decides.
final class Governor {
    private let profile: Profile
    private let way: Way
    private var steps: [String: Int]

    init(_ profile: Profile, _ way: Way) {
        (self.profile, self.way) = (profile, way)
        steps = profile.sensors.mapValues { _ in 0 }
    }

    var step: Int { steps.values.max() ?? 0 }
    var settings: Settings { profile.settings(step, way) }

    /// Readings by the sensor's name, such as celsius: 36.5.
    @discardableResult
    func observe(_ readings: [String: Double]) -> Int {
        for (name, sensor) in profile.sensors { steps[name] = sensor.next(steps[name] ?? 0, readings[name]) }
        return step
    }
}
