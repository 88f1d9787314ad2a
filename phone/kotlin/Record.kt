package modelbundle

// What a phone saw under sustained load: docs/schemas/sustained.schema.json, for `python -m pipeline sustain --import`.

private val UNKNOWN = listOf("private_bytes", "mapped_bytes", "celsius", "headroom", "thermal_state", "hertz").associateWith { null }

/**
 * Collects samples while an answer is generated. subject: device, system, model, variant, release, way, runtime, started,
 * cold_start_seconds, warm_start_seconds.
 */
class SustainedLoad(private val subject: Map<String, Any?>) {
    private val samples = ArrayList<Map<String, Any?>>()

    /**
     * One look: seconds since the start, tokens written since the last look, step, and what the system shows (absent or
     * null: it does not): private_bytes, mapped_bytes, celsius, headroom, thermal_state, hertz.
     */
    fun sample(look: Map<String, Any?>) {
        samples.add(UNKNOWN + look)
    }

    fun json(): String = toJson(mapOf("format" to 1, "kind" to "sustained") + subject + mapOf("samples" to samples))
}
