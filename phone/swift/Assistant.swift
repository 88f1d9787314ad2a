// One answer, from this phone if it can, else from a cloud if the user's policy allows it, else a refusal with a reason.

/// A loaded model, such as onnxruntime-genai's behind its C API.
protocol Model {
    func start(_ prompt: String, _ settings: Settings) throws

    /// The next piece of the answer; nil at its end.
    func next() throws -> String?
}

/// Why an option was passed over. why: not-installed, memory, kernels, load-failed, cloud-forbidden, cloud-failed.
struct Tried {
    let variant: String?
    let weights: String?
    let why: String
    var message = ""
}

/// Who answers: device, cloud or nobody. A device's answer is still to be generated with `model`; a cloud's is `text`.
struct Answerer {
    let by: String
    var model: Model?
    var option: Option?
    var text: String?
    var tried: [Tried]
}

/// How to load. Every method may throw: then the next option is tried.
protocol Means {
    var installed: [String] { get }

    /// The phone now: asked before each option, because loading changes what is free.
    func phone() -> Phone

    /// The graph to load in place of the bundle's own; nil where this processor cannot map the weights.
    func prepare(_ option: Option) throws -> String?

    /// `graph`: nil for the bundle's own.
    func load(_ option: Option, graph: String?) throws -> Model
}

/// The model of an option, or why it cannot be loaded now.
private func attempt(_ option: Option, _ means: Means) -> (model: Model?, why: String, message: String) {
    guard means.installed.contains(option.variant) else { return (nil, "not-installed", "") }
    let missing = option.lacks(means.phone())
    guard missing <= 0 else { return (nil, "memory", "\(missing) bytes are missing") }
    do {
        let graph = option.way.mapped ? try means.prepare(option) : nil
        if option.way.mapped && graph == nil { return (nil, "kernels", "") }
        return (try means.load(option, graph: graph), "", "")
    } catch {
        return (nil, "load-failed", "\(error)")
    }
}

/// Load the best option that is installed and fits, else ask the cloud; `cloud` is nil where the policy forbids it.
func answerOrFallBack(_ options: [Option], _ means: Means, cloud: (() async throws -> String)?) async -> Answerer {
    var tried: [Tried] = []
    for option in options {
        let (model, why, message) = attempt(option, means)
        if let model = model { return Answerer(by: "device", model: model, option: option, tried: tried) }
        tried.append(Tried(variant: option.variant, weights: option.way.weights, why: why, message: message))
    }
    guard let cloud = cloud else {
        let message = "the policy keeps this request on the phone"
        tried.append(Tried(variant: nil, weights: nil, why: "cloud-forbidden", message: message))
        return Answerer(by: "nobody", tried: tried)
    }
    do { return Answerer(by: "cloud", text: try await cloud(), tried: tried) } catch {
        tried.append(Tried(variant: nil, weights: nil, why: "cloud-failed", message: "\(error)"))
        return Answerer(by: "nobody", tried: tried)
    }
}

/// What onnxruntime-genai's Config.overlay takes: the signed way, what heat leaves of it, and the mapped graph's name.
func overlay(_ way: Way, _ settings: Settings, graph: String? = nil) -> String {
    func changed(_ value: StrictJSON?, _ changes: [String: StrictJSON]) -> StrictJSON {
        .object((value?.object ?? [:]).merging(changes) { _, new in new })
    }
    let model = way.genai["model"]
    let decoder = model?["decoder"]
    let session = changed(decoder?["session_options"], ["intra_op_num_threads": .integer(settings.threads)])
    var changes: [String: StrictJSON] = ["session_options": session]
    if let graph = graph { changes["filename"] = .text(graph) }
    let search = changed(way.genai["search"], ["chunk_size": .integer(settings.prefillChunk)])
    return changed(way.genai, ["model": changed(model, ["decoder": changed(decoder, changes)]), "search": search]).json
}

/// Give `say` the pieces of an answer, at most `most`, with a pause between them as heat demands. heat() reads the sensors.
/// Returns the tokens written and how it ended: end, length, heat.
func generate(
    _ model: Model, _ prompt: String, _ governor: Governor, most: Int64, heat: () -> [String: Double],
    pause: (Int64) async throws -> Void, say: (String) -> Void
) async throws -> (tokens: Int64, ended: String) {
    governor.observe(heat())
    try model.start(prompt, governor.settings)
    var tokens: Int64 = 0
    while true {
        if tokens >= most { return (tokens, "length") }
        if tokens >= governor.settings.answerTokens { return (tokens, "heat") }
        guard let piece = try model.next() else { return (tokens, "end") }
        say(piece)
        tokens += 1
        if governor.settings.pauseMs > 0 { try await pause(governor.settings.pauseMs) }
        governor.observe(heat())
    }
}
