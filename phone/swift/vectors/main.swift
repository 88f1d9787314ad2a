// Runs test vectors: the one argument is phone/vectors, or the folder that `python -m pipeline vectors FOLDER` wrote. A line
// for everything that is answered otherwise than expected, then "N of M … agree"; status 1 unless all do.

import Foundation

typealias Fields = StrictJSON

extension StrictJSON {
    func texts(_ key: String) -> [String] { self[key]?.array?.compactMap { $0.text } ?? [] }
    func number(_ key: String, _ otherwise: Int64 = 0) -> Int64 { self[key]?.integer ?? otherwise }
    func flag(_ key: String) -> Bool { self[key]?.truth ?? false }
    func string(_ key: String) -> String { self[key]?.text ?? "" }
    static func maybe(_ text: String?) -> StrictJSON { text.map { .text($0) } ?? .null }
    static func maybe(_ number: Int64?) -> StrictJSON { number.map { .integer($0) } ?? .null }
}

func read(_ file: URL) throws -> StrictJSON { try StrictJSON.parse([UInt8](try Data(contentsOf: file))) }

func bytes(_ file: StrictJSON?) -> Data {
    Data(String(repeating: file?.string("text") ?? "", count: Int(file?.number("times") ?? 0)).utf8)
}

func inFolder<Value>(_ use: (URL) async throws -> Value) async throws -> Value {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    try makeFolder(folder)
    defer { remove(folder) }
    return try await use(folder)
}

/// A byte for each character.
func latin(_ data: Data) -> String { String(String.UnicodeScalarView(data.map { Unicode.Scalar($0) })) }

// MARK: - choose, fall back

func described(_ fields: StrictJSON?) -> Phone {
    Phone(
        platform: fields?.string("platform") ?? "", ramBytes: fields?.number("ram_bytes") ?? 0,
        availableBytes: fields?.number("available_bytes") ?? 0, residentBytes: fields?["resident_bytes"]?.integer,
        maps: fields?.flag("maps") ?? false)
}

func chooses(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    switch try Tiers(shared).choose(described(given["device"])) {
    case .option(let option):
        return .object(["variant": .text(option.variant), "tier": .text(option.tier), "weights": .text(option.way.weights)])
    case .refusal(let kind, let missing, _):
        return .object(["refused": .text(kind), "missing_bytes": .maybe(missing)])
    }
}

struct Failure: Error {}

final class Spoken: Model {
    private var left: Int64
    private let started: (Settings) -> Void

    init(_ pieces: Int64, _ started: @escaping (Settings) -> Void = { _ in }) { (left, self.started) = (pieces, started) }
    func start(_ prompt: String, _ settings: Settings) { started(settings) }
    func next() -> String? {
        left -= 1
        return left >= 0 ? "word" : nil
    }
}

struct Given: Means {
    let fields: Fields
    var installed: [String] { fields.texts("installed") }
    func phone() -> Phone { described(fields["device"]) }
    func prepare(_ option: Option) -> String? { fields.flag("kernels") ? "mapped.onnx" : nil }
    func load(_ option: Option, graph: String?) throws -> Model {
        let broken = fields["broken"]?.array?.map { $0.array?.compactMap { $0.text } ?? [] } ?? []
        if broken.contains([option.variant, option.way.weights]) { throw Failure() }
        return Spoken(0)
    }
}

func fallsBack(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    let cloud: () async throws -> String = {
        if given.string("cloud") == "fails" { throw Failure() }
        return "an answer"
    }
    let options = try Tiers(shared).ranked(described(given["device"]))
    let found = await answerOrFallBack(options, Given(fields: given), cloud: given.string("cloud") == "forbidden" ? nil : cloud)
    let tried = found.tried.map { StrictJSON.array([.maybe($0.variant), .maybe($0.weights), .text($0.why)]) }
    return .object([
        "by": .text(found.by), "variant": .maybe(found.option?.variant), "weights": .maybe(found.option?.way.weights),
        "tried": .array(tried),
    ])
}

// MARK: - heat

func heats(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    let governor = Governor(try Profile(try required(shared["profile"], "profile")), try Way(given["way"]))
    let steps = (given["readings"]?.array ?? []).map { reading in
        StrictJSON.integer(Int64(governor.observe((reading.object ?? [:]).compactMapValues { $0.double })))
    }
    let left = governor.settings
    return .object([
        "steps": .array(steps),
        "settings": .object([
            "threads": .integer(left.threads), "prefill_chunk": .integer(left.prefillChunk),
            "answer_tokens": .integer(left.answerTokens), "pause_ms": .integer(left.pauseMs),
        ]),
    ])
}

func answers(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    var left = (given["celsius"]?.array ?? []).compactMap { $0.double }
    var (last, paused, started) = (0.0, Int64(0), StrictJSON.null)
    let governor = Governor(try Profile(try required(shared["profile"], "profile")), try Way(given["way"]))
    let model = Spoken(given.number("pieces")) {
        started = .object(["threads": .integer($0.threads), "prefill_chunk": .integer($0.prefillChunk)])
    }
    let heat = { () -> [String: Double] in
        if !left.isEmpty { last = left.removeFirst() }
        return ["celsius": last]
    }
    let (tokens, ended) = try await generate(
        model, "a question", governor, most: given.number("most"), heat: heat, pause: { paused += $0 }, say: { _ in })
    return .object([
        "tokens": .integer(tokens), "ended": .text(ended), "paused_ms": .integer(paused), "started": started,
    ])
}

func overlays(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    func number(_ name: String) -> Int64 { given["settings"]?.number(name) ?? 0 }
    let settings = Settings(
        threads: number("threads"), prefillChunk: number("prefill_chunk"), answerTokens: number("answer_tokens"),
        pauseMs: number("pause_ms"))
    return try StrictJSON.parse([UInt8](overlay(try Way(given["way"]), settings, graph: given["graph"]?.text).utf8))
}

// MARK: - releases

func records(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    try await inFolder { folder in
        let state = folder.appendingPathComponent("releases.json")
        if let text = given["file"]?.text { try Data(text.utf8).write(to: state) }
        let outcomes = try (given["record"]?.array ?? []).map { entry -> String in
            let pair = entry.array ?? []
            do {
                try Releases(file: state).record(pair[0].text ?? "", pair[1].integer ?? 0)
                return "ok"
            } catch let error as StateError { return error.kind }
        }
        let releases = outcomes.contains("unreadable") ? .null : try read(state)["releases"]
        return .object(["outcomes": .array(outcomes.map { .text($0) }), "releases": releases ?? .null])
    }
}

// MARK: - fetch

/// A place that answers as a case says, and remembers what it was asked for.
final class Told: Place {
    private var blobs: [String: (name: String, data: Data, steps: [StrictJSON])] = [:]
    private(set) var requests: [StrictJSON] = []

    init(_ given: Fields) {
        for (name, file) in (given["files"]?.object ?? [:]).sorted(by: { $0.key < $1.key }) {
            let path = "blobs/sha256/\(sha256(bytes(file)))"
            let steps = (given["answers"]?[name]?.array ?? []).flatMap { step in
                Array(repeating: step, count: Int(step.number("times", 1)))
            }
            if blobs[path] == nil { blobs[path] = (name, bytes(file), steps) }
        }
    }

    func get(_ path: String, from start: Int64) async throws -> Reply {
        guard var blob = blobs[path] else { throw Failure() }
        requests.append(.array([.text(blob.name), .integer(start)]))
        let step = blob.steps.isEmpty ? .object([:]) : blob.steps.removeFirst()
        blobs[path] = blob
        if step.flag("silent") { throw Interrupted(message: "no connection") }
        let from = step.flag("no_range") ? 0 : start
        let total = step.number("claim", Int64(blob.data.count))
        var body = blob.data
        if let at = step["flip"]?.integer { body[Int(at)] ^= 1 }
        let status = Int(step.number("status", from > 0 || step["range"] != nil ? 206 : 200))
        let range = status == 206 ? step["range"]?.text ?? "bytes \(from)-\(total - 1)/\(total)" : nil
        let (sent, cut) = (body.dropFirst(Int(from)), step["cut"]?.integer)
        let pieces = AsyncThrowingStream<Data, Error> { stream in
            stream.yield(Data(sent.prefix(cut.map { Int($0) } ?? sent.count)))
            stream.finish(throwing: cut == nil ? nil : Interrupted(message: "cut"))
        }
        return Reply(status: status, range: range, length: total, body: pieces)
    }
}

func lay(_ folder: URL, _ given: Fields) throws {
    for (name, file) in given["installed"]?.object ?? [:] {
        try write(folder.appendingPathComponent("installed/\(name)"), bytes(file))
    }
    for (name, rest) in given["left"]?.object ?? [:] {
        let whole = given["files"]?[name].map { bytes($0) } ?? Data("of another release".utf8)
        let count = Int(rest.number("bytes"))
        let kept = (whole + Data(count: count)).prefix(count).map { rest.flag("spoilt") ? $0 ^ 1 : $0 }
        try write(folder.appendingPathComponent("parts/\(sha256(whole)).partial"), Data(kept))
    }
}

func fetches(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    try await inFolder { folder in
        try lay(folder, given)
        let wanted = (given["files"]?.object ?? [:]).mapValues { SignedFile(size: Int64(bytes($0).count), sha256: sha256(bytes($0))) }
        var states = given["metered"]?.array?.compactMap { $0.truth } ?? [false]
        var pauses: [StrictJSON] = []
        let network = NetworkPolicy(
            meteredBytes: given.number("metered_bytes"), metered: { states.count > 1 ? states.removeFirst() : states[0] },
            free: { _ in given.number("free", Int64.max) }, pause: { pauses.append(.integer($0)) })
        let place = Told(given)
        let fetcher = Fetcher(place, network)
        let (parts, installed) = (folder.appendingPathComponent("parts"), folder.appendingPathComponent("installed"))
        let plan = try fetcher.plan(wanted, into: parts, installed: installed)
        var outcome = "ok"
        do {
            try await fetcher.fetch(wanted, into: parts, installed: installed)
            for file in wanted.values where try hashFile(parts.appendingPathComponent(file.sha256).path) != file.sha256 {
                outcome = "not there"
            }
        } catch let error as FetchError { outcome = error.kind }
        var left: [String: StrictJSON] = [:]
        for name in list(parts) where name.hasSuffix(".partial") {
            let known = wanted.first { name.hasPrefix($0.value.sha256) }?.key ?? name
            left[known] = .maybe(size(parts.appendingPathComponent(name)))
        }
        return .object([
            "outcome": .text(outcome), "download": .integer(plan.download), "reused": .integer(plan.reused),
            "requests": .array(place.requests), "left": .object(left), "pauses": .array(pauses),
        ])
    }
}

// MARK: - prepare

final class Saved: PackingRuntime {
    let version = "1.32.0"
    let processor = "one"
    private let saves: [StrictJSON]
    private(set) var packs: [StrictJSON] = []

    init(_ given: Fields) { saves = given["saves"]?.array ?? [] }

    func saveSlice(_ graph: URL, _ number: Int, into folder: URL) throws {
        packs.append(.integer(Int64(number)))
        try write(folder.appendingPathComponent("\(number).onnx"), Data(saves[number].string("graph").utf8))
        try write(folder.appendingPathComponent("\(number).raw"), Data(saves[number].string("raw").utf8))
    }
}

func prepares(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    try await inFolder { folder in
        try write(folder.appendingPathComponent("prepack.json"), Data((shared["prepack"] ?? .null).json.utf8))
        let prepacked = folder.appendingPathComponent("prepacked")
        for (name, text) in given["before"]?.object ?? [:] {
            try write(prepacked.appendingPathComponent(name), Data(text.text?.unicodeScalars.map { UInt8($0.value) } ?? []))
        }
        let runtime = Saved(given)
        let prepare = try Prepare(folder, runtime, free: { given.number("free") })
        var found: Prepared?
        do { found = try prepare.run() } catch is NoRoom {}
        var files: [String: StrictJSON] = [:]
        for name in list(prepacked) where name != "ready.json" {
            files[name] = .text(latin(try Data(contentsOf: prepacked.appendingPathComponent(name))))
        }
        return .object([
            "graph": .maybe(found?.graph), "kernels": .maybe(found?.kernels), "packs": .array(runtime.packs),
            "files": .object(files), "then": .text(try prepare.ready().graph),
        ])
    }
}

// MARK: - policy

func decides(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    func merged(_ name: String) -> StrictJSON {
        .object((shared["defaults"]?[name]?.object ?? [:]).merging(given[name]?.object ?? [:]) { _, own in own })
    }
    let (now, bounds) = (merged("situation"), merged("limits"))
    let situation = Situation(
        network: now.string("network"), battery: now["battery"]?.double, charging: now.flag("charging"), heat: now.string("heat"),
        deviceReady: now.flag("device_ready"))
    let limits = Limits(
        low: bounds.number("low"), high: bounds.number("high"), threshold: bounds.number("threshold"),
        turns: bounds.number("turns"), battery: try required(bounds["battery"]?.double, "battery"), heat: bounds.string("heat"),
        metered: bounds.flag("metered"))
    let made = decide(
        Request(
            mode: given.string("mode"), tokens: given.number("tokens"), turns: given.number("turns"),
            isPrivate: given.flag("private"), situation: situation, limits: limits))
    return .object([
        "rule": .text(made.rule), "first": .maybe(made.first), "then": .maybe(made.then), "level": .text(made.level),
    ])
}

func doubted(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    let logprobs = (given["logprobs"]?.array ?? []).compactMap { $0.double }
    let threshold = try required(given["threshold"]?.double, "threshold")
    return .truth(doubts(logprobs, tokens: Int(given.number("tokens")), threshold: threshold))
}

func kept(_ given: Fields, _ shared: Fields) async throws -> StrictJSON {
    .truth(isPrivate(given.texts("tags"), known: (given["known"]?.object ?? [:]).compactMapValues { $0.text }))
}

// MARK: - the whole

typealias Run = (Fields, Fields) async throws -> StrictJSON
let runs: [String: [(String, Run)]] = [
    "answer": [("cases", answers)], "choose": [("cases", chooses)], "fall_back": [("cases", fallsBack)],
    "fetch": [("cases", fetches)], "heat": [("cases", heats)], "overlay": [("cases", overlays)], "prepare": [("cases", prepares)],
    "policy": [("decisions", decides), ("doubts", doubted), ("tags", kept)], "releases": [("cases", records)],
]

func behaviours(_ folder: URL) async throws -> (agree: Int, all: Int) {
    var (agree, all) = (0, 0)
    for name in list(folder) {
        let (shared, kind) = (try read(folder.appendingPathComponent(name)), String(name.dropLast(5)))
        for (key, run) in runs[kind] ?? [] {
            for given in shared[key]?.array ?? [] {
                let (found, expected) = (try await run(given, shared).json, (given["expect"] ?? .null).json)
                all += 1
                if found == expected { agree += 1 } else {
                    print("\(kind): \(given.string("name")): expected \(expected), found \(found)")
                }
            }
        }
    }
    return (agree, all)
}

func bundles(_ folder: URL) throws -> (agree: Int, all: Int) {
    var agree = 0
    for name in list(folder) {
        let vector = try read(folder.appendingPathComponent("\(name)/vector.json"))
        var question = Question(pinnedKeys: vector.texts("pinned_keys"))
        question.now = ISO8601DateFormatter().date(from: vector.string("now")) ?? Date()
        question.highestRelease = vector["highest_release"]?.integer
        question.allowDevelopment = vector.flag("allow_development")
        question.appVersion = vector["app_version"]?.integer
        (question.tier, question.model, question.variant) = (vector["tier"]?.text, vector["model"]?.text, vector["variant"]?.text)
        question.kind = vector.string("kind")
        let expected = (vector["findings"]?.array ?? []).map { ($0.array ?? []).compactMap { $0.text }.joined(separator: ": ") }
        let answer = try BundleVerifier.verify(folder.appendingPathComponent("\(name)/bundle"), question)
        let found = Set(answer.findings.map { "\($0.kind): \($0.file)" })
        if found == Set(expected) { agree += 1 } else {
            print("\(name): expected [\(expected.sorted().joined(separator: ", "))], found [\(found.sorted().joined(separator: ", "))]")
        }
    }
    return (agree, list(folder).count)
}

let folder = URL(fileURLWithPath: CommandLine.arguments[1])
let areBehaviours = list(folder).contains { $0.hasSuffix(".json") }
let (agree, all) = areBehaviours ? try await behaviours(folder) : try bundles(folder)
print("\(agree) of \(all) \(areBehaviours ? "cases" : "vectors") agree")
exit(agree == all && all > 0 ? 0 : 1)
