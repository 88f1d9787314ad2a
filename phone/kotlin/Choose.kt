package modelbundle

// Which variant does this phone run, in which way, with the memory that is free now? Read from the signed tiers.json.
//
// A class of devices has one decision in tiers.json. A phone may take its own class's and every lower one's, so a phone
// that is short of memory finds a lighter way of the same variant, or a smaller variant, or a refusal with the numbers.

/**
 * The phone now: RAM, private bytes that the app may take, bytes of RAM for private and mapped memory together (null: not
 * known), and whether its processor is of a kernel class that the bundle names.
 */
class Phone(
    val platform: String,
    val ramBytes: Long,
    val availableBytes: Long,
    val residentBytes: Long? = null,
    val maps: Boolean = true
)

/** How a variant is run. `genai` is what onnxruntime-genai's Config.overlay takes to make it so. */
class Way(val fields: Map<*, *>) {
    val context = fields["context"] as Long
    val mapped = fields["weights"] == "mapped"
    val weights = fields["weights"] as String
    val prefillChunk = fields["prefill_chunk"] as Long
    val threads = fields["threads"] as Long
    val genai = (fields["genai"] as Map<*, *>?).orEmpty()
}

/** A bundle that the signed tiers allow, and the way to run it. Bytes; `klMean` in nats per token. */
class Option(val tier: String, fields: Map<*, *>, pin: Map<*, *>) {
    val variant = fields["variant"] as String
    val way = Way(fields["way"] as Map<*, *>)
    val needBytes = fields["need_bytes"] as Long
    val mappedBytes = fields["mapped_bytes"] as Long
    val bundleBytes = fields["bundle_bytes"] as Long
    val klMean = double(fields["kl_mean"])
    val signatureSha256 = pin["signature_sha256"] as String
    val release = pin["release"] as Long

    /** Bytes that it lacks on this phone now; zero or less where it fits. */
    fun lacks(phone: Phone): Long {
        val together = phone.residentBytes?.let { needBytes + mappedBytes - it } ?: Long.MIN_VALUE
        return maxOf(needBytes - phone.availableBytes, together)
    }
}

/** Why a phone gets nothing. kind: no-class, refused, memory. `missingBytes` is null where nobody knows. */
class Refusal(val kind: String, val missingBytes: Long?, val message: String)

/** The best option that fits now, or why there is none. */
class Choice(val option: Option?, val refusal: Refusal?)

/** Best first: the longest context, as the tiers were decided; then the lowest divergence; then what loads as it is. */
private val RANK = compareBy<Option>({ -it.way.context }, { it.klMean }, { it.way.mapped }, { -it.way.prefillChunk }, { it.needBytes })

/** What the signed tiers.json says: `fields` are those of the verified document. */
class Tiers(fields: Map<*, *>) {
    private val decisions = (fields["tiers"] as Map<*, *>).map { (tier, decision) -> (tier as String) to (decision as Map<*, *>) }
    private val bundles = fields["bundles"] as Map<*, *>

    private fun classes(phone: Phone) = decisions
        .filter { (_, decision) -> decision["platform"] == phone.platform && decision["ram_bytes"] as Long <= phone.ramBytes }
        .sortedByDescending { (_, decision) -> decision["ram_bytes"] as Long }

    /** All that the signed tiers allow this phone, best first, whatever memory is free. */
    fun ranked(phone: Phone): List<Option> = classes(phone)
        .filter { (_, decision) -> decision["decision"] == "bundle" }
        .map { (tier, decision) -> Option(tier, decision, bundles[decision["variant"]] as Map<*, *>) }
        .filter { phone.maps || !it.way.mapped }
        .sortedWith(RANK)

    fun choose(phone: Phone): Choice {
        val (own, decision) = classes(phone).firstOrNull()
            ?: return refuse("no-class", null, "no class of devices begins at ${phone.ramBytes} bytes of RAM or below")
        val options = ranked(phone)
        if (options.isEmpty()) {
            val unmapped = "its weights have to be mapped, and this processor is of none of the bundle's kernel classes"
            val reasons = decision["reasons"] as List<*>? ?: listOf(unmapped)
            return refuse("refused", decision["shortfall_bytes"] as Long?, "$own: ${reasons.joinToString("; ")}")
        }
        options.firstOrNull { it.lacks(phone) <= 0 }?.let { return Choice(it, null) }
        val nearest = options.sortedBy { it.lacks(phone) }.first()
        val needs = "${nearest.variant} with weights ${nearest.way.weights} needs ${nearest.needBytes} bytes private and " +
            "${nearest.mappedBytes} mapped; ${phone.availableBytes} bytes are free now"
        return refuse("memory", nearest.lacks(phone), needs)
    }

    private fun refuse(kind: String, missing: Long?, message: String) = Choice(null, Refusal(kind, missing, message))
}
