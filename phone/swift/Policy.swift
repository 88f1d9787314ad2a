// Who answers, device or cloud: the first rule that holds decides. The table of pipeline/serve/hybrid, for an app.

private let heats = ["nominal", "fair", "serious", "critical"]

/// network: none, metered, unmetered. battery: the share that is left, nil: not known. heat: the step's name.
struct Situation {
    var network = "unmetered"
    var battery: Double?
    var charging = false
    var heat = "nominal"
    var deviceReady = true
}

/// Tokens: LOW below `low`, HIGH above `high`. `metered`: whether such a network may be used.
struct Limits {
    var low: Int64
    var high: Int64
    var threshold: Int64
    var turns: Int64
    var battery: Double
    var heat: String
    var metered: Bool
}

/// mode: only_device, prefer_device, prefer_cloud, only_cloud.
struct Request {
    var mode: String
    var tokens: Int64
    var turns: Int64
    var isPrivate: Bool
    var situation: Situation
    var limits: Limits

    var level: String { tokens < limits.low ? "LOW" : tokens > limits.high ? "HIGH" : "MEDIUM" }
    var ready: Bool { situation.deviceReady }
    var offline: Bool { situation.network == "none" || (situation.network == "metered" && !limits.metered) }
    var hot: Bool { (heats.firstIndex(of: situation.heat) ?? 0) >= (heats.firstIndex(of: limits.heat) ?? heats.count) }
    var drained: Bool { situation.battery.map { $0 < limits.battery && !situation.charging } ?? false }
}

/// Who is asked first (nil: nobody, a refusal), and who then.
struct Decision: Equatable {
    let rule: String
    let first: String?
    let then: String?
    let level: String
}

private struct Rule {
    let name: String
    let first: String?
    let then: String?
    let holds: (Request) -> Bool

    init(_ name: String, _ first: String?, _ then: String? = nil, _ holds: @escaping (Request) -> Bool) {
        (self.name, self.first, self.then, self.holds) = (name, first, then, holds)
    }
}

private let rules = [
    Rule("private_only_cloud", nil) { $0.isPrivate && $0.mode == "only_cloud" },
    Rule("private_no_device", nil) { $0.isPrivate && !$0.ready },
    Rule("private", "device") { $0.isPrivate },
    Rule("only_cloud_offline", nil) { $0.mode == "only_cloud" && $0.offline },
    Rule("only_cloud", "cloud") { $0.mode == "only_cloud" },
    Rule("no_device", nil) { $0.mode == "only_device" && !$0.ready },
    Rule("only_device", "device") { $0.mode == "only_device" },
    Rule("nobody", nil) { $0.offline && !$0.ready },
    Rule("offline", "device") { $0.offline },
    Rule("device_not_ready", "cloud") { !$0.ready },
    Rule("prefer_cloud", "cloud", "device") { $0.mode == "prefer_cloud" },
    Rule("heat", "cloud", "device") { $0.hot },
    Rule("battery", "cloud", "device") { $0.drained },
    Rule("low", "device", "cloud") { $0.level == "LOW" },
    Rule("high", "cloud", "device") { $0.level == "HIGH" },
    Rule("turns", "cloud", "device") { $0.turns > $0.limits.turns },
    Rule("threshold", "cloud", "device") { $0.tokens > $0.limits.threshold },
]
private let otherwise = Rule("short", "device", "cloud") { _ in true }

func decide(_ request: Request) -> Decision {
    let rule = rules.first { $0.holds(request) } ?? otherwise
    return Decision(rule: rule.name, first: rule.first, then: rule.then, level: request.level)
}

/// Whether a tag keeps a request on the device; one that `known` lacks does: a misspelt tag must not leak.
func isPrivate(_ tags: [String], known: [String: String]) -> Bool { tags.contains { known[$0, default: "device"] == "device" } }

/// Whether an answer whose first `tokens` had these log-probabilities (nats) is doubted; of none, it is not.
func doubts(_ logprobs: [Double], tokens: Int, threshold: Double) -> Bool {
    let first = logprobs.prefix(tokens)
    return !first.isEmpty && first.reduce(0, +) / Double(first.count) < threshold
}
