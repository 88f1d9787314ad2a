package modelbundle

// Who answers, device or cloud: the first rule that holds decides. The table of pipeline/serve/hybrid, for an app.

private val HEATS = listOf("nominal", "fair", "serious", "critical")

/** network: none, metered, unmetered. battery: the share that is left, null: not known. heat: the step's name. */
class Situation(
    val network: String = "unmetered",
    val battery: Double? = null,
    val charging: Boolean = false,
    val heat: String = "nominal",
    val deviceReady: Boolean = true
)

/** Tokens: LOW below `low`, HIGH above `high`. `metered`: whether such a network may be used. */
class Limits(
    val low: Long,
    val high: Long,
    val threshold: Long,
    val turns: Long,
    val battery: Double,
    val heat: String,
    val metered: Boolean
)

/** mode: only_device, prefer_device, prefer_cloud, only_cloud. */
class Request(
    val mode: String,
    val tokens: Long,
    val turns: Long,
    val private: Boolean,
    val situation: Situation,
    val limits: Limits
) {
    val level = if (tokens < limits.low) "LOW" else if (tokens > limits.high) "HIGH" else "MEDIUM"
    val ready = situation.deviceReady
    val offline = situation.network == "none" || (situation.network == "metered" && !limits.metered)
    val hot = HEATS.indexOf(situation.heat) >= HEATS.indexOf(limits.heat)
    val drained = situation.battery != null && situation.battery < limits.battery && !situation.charging
}

/** Who is asked first (null: nobody, a refusal), and who then. */
class Decision(val rule: String, val first: String?, val then: String?, val level: String)

private class Rule(val name: String, val first: String?, val then: String? = null, val holds: (Request) -> Boolean)

private val RULES = listOf(
    Rule("private_only_cloud", null) { it.private && it.mode == "only_cloud" },
    Rule("private_no_device", null) { it.private && !it.ready },
    Rule("private", "device") { it.private },
    Rule("only_cloud_offline", null) { it.mode == "only_cloud" && it.offline },
    Rule("only_cloud", "cloud") { it.mode == "only_cloud" },
    Rule("no_device", null) { it.mode == "only_device" && !it.ready },
    Rule("only_device", "device") { it.mode == "only_device" },
    Rule("nobody", null) { it.offline && !it.ready },
    Rule("offline", "device") { it.offline },
    Rule("device_not_ready", "cloud") { !it.ready },
    Rule("prefer_cloud", "cloud", "device") { it.mode == "prefer_cloud" },
    Rule("heat", "cloud", "device") { it.hot },
    Rule("battery", "cloud", "device") { it.drained },
    Rule("low", "device", "cloud") { it.level == "LOW" },
    Rule("high", "cloud", "device") { it.level == "HIGH" },
    Rule("turns", "cloud", "device") { it.turns > it.limits.turns },
    Rule("threshold", "cloud", "device") { it.tokens > it.limits.threshold },
    Rule("short", "device", "cloud") { true }
)

fun decide(request: Request): Decision {
    val rule = RULES.first { it.holds(request) }
    return Decision(rule.name, rule.first, rule.then, request.level)
}

/** Whether a tag keeps a request on the device; one that `known` lacks does: a misspelt tag must not leak. */
fun isPrivate(tags: List<String>, known: Map<String, String>): Boolean = tags.any { (known[it] ?: "device") == "device" }

/** Whether an answer whose first `tokens` had these log-probabilities (nats) is doubted; of none, it is not. */
fun doubts(logprobs: List<Double>, tokens: Int, threshold: Double): Boolean {
    val first = logprobs.take(tokens)
    return first.isNotEmpty() && first.sum() / first.size < threshold
}
