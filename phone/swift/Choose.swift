// Which variant does this phone run, in which way, with the memory that is free now? Read from the signed tiers.json.
//
// A class of devices has one decision in tiers.json. A phone may take its own class's and every lower one's, so a phone
// that is short of memory finds a lighter way of the same variant, or a smaller variant, or a refusal with the numbers.

/// The phone now: RAM, private bytes that the app may take, bytes of RAM for private and mapped memory together (nil: not
/// known), and whether its processor is of a kernel class that the bundle names.
struct Phone {
    var platform: String
    var ramBytes: Int64
    var availableBytes: Int64
    var residentBytes: Int64?
    var maps = true
}

/// A field of a signed document that has to be there.
func required<Value>(_ value: Value?, _ name: String) throws -> Value {
    guard let value = value else { throw Malformed(message: "\(name) is missing or not valid") }
    return value
}

/// How a variant is run. `genai` is what onnxruntime-genai's Config.overlay takes to make it so.
struct Way {
    let context: Int64
    let weights: String
    let prefillChunk: Int64
    let threads: Int64
    let genai: StrictJSON
    var mapped: Bool { weights == "mapped" }

    init(_ fields: StrictJSON?) throws {
        context = try required(fields?["context"]?.integer, "context")
        weights = try required(fields?["weights"]?.text, "weights")
        prefillChunk = try required(fields?["prefill_chunk"]?.integer, "prefill_chunk")
        threads = try required(fields?["threads"]?.integer, "threads")
        genai = fields?["genai"] ?? .object([:])
    }
}

/// A bundle that the signed tiers allow, and the way to run it. Bytes; `klMean` in nats per token.
struct Option {
    let tier: String
    let variant: String
    let way: Way
    let needBytes: Int64
    let mappedBytes: Int64
    let bundleBytes: Int64
    let klMean: Double
    let signatureSha256: String
    let release: Int64

    init(tier: String, _ fields: StrictJSON, bundles: StrictJSON?) throws {
        self.tier = tier
        variant = try required(fields["variant"]?.text, "variant")
        way = try Way(fields["way"])
        needBytes = try required(fields["need_bytes"]?.integer, "need_bytes")
        mappedBytes = try required(fields["mapped_bytes"]?.integer, "mapped_bytes")
        bundleBytes = try required(fields["bundle_bytes"]?.integer, "bundle_bytes")
        klMean = try required(fields["kl_mean"]?.double, "kl_mean")
        signatureSha256 = try required(bundles?[variant]?["signature_sha256"]?.text, "signature_sha256")
        release = try required(bundles?[variant]?["release"]?.integer, "release")
    }

    /// Bytes that it lacks on this phone now; zero or less where it fits.
    func lacks(_ phone: Phone) -> Int64 {
        let together = phone.residentBytes.map { needBytes + mappedBytes - $0 } ?? Int64.min
        return max(needBytes - phone.availableBytes, together)
    }

    /// Best first: the longest context, as the tiers were decided; then the lowest divergence; then what loads as it is.
    static func ranksBefore(_ one: Option, _ other: Option) -> Bool {
        if one.way.context != other.way.context { return one.way.context > other.way.context }
        if one.klMean != other.klMean { return one.klMean < other.klMean }
        if one.way.mapped != other.way.mapped { return other.way.mapped }
        if one.way.prefillChunk != other.way.prefillChunk { return one.way.prefillChunk > other.way.prefillChunk }
        return one.needBytes < other.needBytes
    }
}

/// The best option that fits now, or why there is none. kind: no-class, refused, memory; missing is nil where nobody knows.
enum Choice {
    case option(Option)
    case refusal(kind: String, missingBytes: Int64?, message: String)
}

/// What the signed tiers.json says: `fields` are those of the verified document.
struct Tiers {
    private let decisions: [(tier: String, fields: StrictJSON)]
    private let bundles: StrictJSON?

    init(_ fields: StrictJSON) throws {
        decisions = try required(fields["tiers"]?.object, "tiers").map { ($0.key, $0.value) }
        bundles = fields["bundles"]
    }

    private func classes(_ phone: Phone) -> [(tier: String, fields: StrictJSON)] {
        func edge(_ fields: StrictJSON) -> Int64 { fields["ram_bytes"]?.integer ?? Int64.max }
        return decisions.filter { $0.fields["platform"]?.text == phone.platform && edge($0.fields) <= phone.ramBytes }
            .sorted { edge($0.fields) > edge($1.fields) }
    }

    /// All that the signed tiers allow this phone, best first, whatever memory is free.
    func ranked(_ phone: Phone) throws -> [Option] {
        try classes(phone).filter { $0.fields["decision"]?.text == "bundle" }
            .map { try Option(tier: $0.tier, $0.fields, bundles: bundles) }
            .filter { phone.maps || !$0.way.mapped }
            .sorted(by: Option.ranksBefore)
    }

    func choose(_ phone: Phone) throws -> Choice {
        guard let own = classes(phone).first else {
            let message = "no class of devices begins at \(phone.ramBytes) bytes of RAM or below"
            return .refusal(kind: "no-class", missingBytes: nil, message: message)
        }
        let options = try ranked(phone)
        guard let nearest = options.min(by: { $0.lacks(phone) < $1.lacks(phone) }) else {
            let unmapped = "its weights have to be mapped, and this processor is of none of the bundle's kernel classes"
            let reasons = own.fields["reasons"]?.array?.compactMap { $0.text } ?? [unmapped]
            let message = "\(own.tier): \(reasons.joined(separator: "; "))"
            return .refusal(kind: "refused", missingBytes: own.fields["shortfall_bytes"]?.integer, message: message)
        }
        if let option = options.first(where: { $0.lacks(phone) <= 0 }) { return .option(option) }
        let needs = "needs \(nearest.needBytes) bytes private and \(nearest.mappedBytes) mapped"
        let message = "\(nearest.variant) with weights \(nearest.way.weights) \(needs); \(phone.availableBytes) are free now"
        return .refusal(kind: "memory", missingBytes: nearest.lacks(phone), message: message)
    }
}
