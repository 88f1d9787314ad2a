package modelbundle

// How hard may the phone work now? Heat decides the step; a step says threads, chunk, length of an answer and pauses.
//
// ../profile.json holds the thresholds and the steps. A reading at a threshold raises the step at once; it falls only when
// the reading is more than the hysteresis below, so that it does not swing between two steps.

/** What a step leaves of a way: threads and chunk when a model is loaded, tokens of an answer, milliseconds between tokens. */
data class Settings(val threads: Long, val prefillChunk: Long, val answerTokens: Long, val pauseMs: Long)

/** A sensor's thresholds, one for each step above the first, and its hysteresis, in its own unit. */
class Sensor(fields: Map<*, *>) {
    private val from = (fields["from"] as List<*>).map { double(it) }
    private val hysteresis = double(fields["hysteresis"])

    /** The step after a reading; the same step where there is none (null, NaN). */
    fun next(step: Int, reading: Double?): Int {
        if (reading == null || reading.isNaN()) return step
        val reached = from.count { reading >= it }
        val kept = from.count { reading + hysteresis >= it }
        return maxOf(reached, minOf(step, kept))
    }
}

/** profile.json, as StrictJson reads it. */
class Profile(fields: Map<*, *>) {
    private val steps = (fields["steps"] as List<*>).map { it as Map<*, *> }
    val sensors = (fields["sensors"] as Map<*, *>).map { (name, rule) -> (name as String) to Sensor(rule as Map<*, *>) }.toMap()

    /** Such as `serious`: a word of the policy, too. */
    fun name(step: Int) = steps[step]["name"] as String

    fun settings(step: Int, way: Way): Settings {
        val row = steps[step]
        return Settings(
            threads = maxOf(1, (way.threads * row["threads_percent"] as Long + 99) / 100),
            prefillChunk = minOf(way.prefillChunk, row["prefill_chunk"] as Long),
            answerTokens = minOf(way.context, row["answer_tokens"] as Long? ?: Long.MAX_VALUE),
            pauseMs = row["pause_ms"] as Long
        )
    }
}

/** Follows a phone's sensors; the one that is worst decides. */
class Governor(private val profile: Profile, private val way: Way) {
    private val steps = profile.sensors.mapValues { 0 }.toMutableMap()

    val step: Int get() = steps.values.max()
    val settings: Settings get() = profile.settings(step, way)

    /** Readings by the sensor's name, such as celsius to 36.5. */
    fun observe(readings: Map<String, Double?>): Int {
        for ((name, sensor) in profile.sensors) steps[name] = sensor.next(steps.getValue(name), readings[name])
        return step
    }
}
