package modelbundle

// One answer, from this phone if it can, else from a cloud if the user's policy allows it, else a refusal with a reason.

import java.io.Closeable
import java.io.File
import java.nio.file.Files

/** A loaded model, such as onnxruntime-genai's behind android/Genai.kt. */
interface Model : Closeable {
    fun start(prompt: String, settings: Settings)

    /** The next piece of the answer; null at its end. */
    fun next(): String?
}

/** Why an option was passed over. why: not-installed, memory, kernels, load-failed, cloud-forbidden, cloud-failed. */
class Tried(val variant: String?, val weights: String?, val why: String, val message: String = "")

/** Who answers: device, cloud or nobody. A device's answer is still to be generated with `model`; a cloud's is `text`. */
class Answerer(val by: String, val model: Model?, val option: Option?, val text: String?, val tried: List<Tried>)

/** How to load. Every method may throw: then the next option is tried. */
interface Means {
    val installed: List<String>

    /** The phone now: asked before each option, because loading changes what is free. */
    fun phone(): Phone

    /** The graph to load in place of the bundle's own; null where this processor cannot map the weights. */
    fun prepare(option: Option): String?

    /** `graph`: null for the bundle's own. */
    fun load(option: Option, graph: String?): Model
}

/** Load the best option that is installed and fits, else ask the cloud; `cloud` is null where the policy forbids it. */
fun answerOrFallBack(options: List<Option>, means: Means, cloud: (() -> String)?): Answerer {
    val tried = ArrayList<Tried>()
    for (option in options) {
        val (why, message) = when {
            option.variant !in means.installed -> "not-installed" to ""
            option.lacks(means.phone()) > 0 -> "memory" to "${option.lacks(means.phone())} bytes are missing"
            else -> try {
                val graph = if (option.way.mapped) means.prepare(option) else null
                if (graph != null || !option.way.mapped) {
                    return Answerer("device", means.load(option, graph), option, null, tried)
                }
                "kernels" to ""
            } catch (error: Exception) {
                "load-failed" to error.toString()
            }
        }
        tried.add(Tried(option.variant, option.way.weights, why, message))
    }
    if (cloud == null) {
        tried.add(Tried(null, null, "cloud-forbidden", "the policy keeps this request on the phone"))
        return Answerer("nobody", null, null, null, tried)
    }
    return try {
        Answerer("cloud", null, null, cloud(), tried)
    } catch (error: Exception) {
        tried.add(Tried(null, null, "cloud-failed", error.toString()))
        Answerer("nobody", null, null, null, tried)
    }
}

/** What onnxruntime-genai's Config.overlay takes: the signed way, what heat leaves of it, and the mapped graph's name. */
fun overlay(way: Way, settings: Settings, graph: String? = null): String {
    fun Map<*, *>.part(name: String) = (this[name] as Map<*, *>?).orEmpty()
    val model = way.genai.part("model")
    val decoder = model.part("decoder")
    val session = decoder.part("session_options") + ("intra_op_num_threads" to settings.threads)
    val file = if (graph == null) emptyMap() else mapOf("filename" to graph)
    val search = way.genai.part("search") + ("chunk_size" to settings.prefillChunk)
    return toJson(way.genai + mapOf("model" to model + mapOf("decoder" to decoder + file + ("session_options" to session)), "search" to search))
}

private fun laidOver(below: Any?, above: Any?): Any? {
    if (below !is Map<*, *> || above !is Map<*, *>) return above
    return below + above.mapValues { (key, value) -> laidOver(below[key], value) }
}

/**
 * For a runtime without Config.overlay: a folder that it loads in place of `content`. It has genai_config.json with
 * `overlay` laid over it, the tokenizer's files, and a link to `content`, which stays as it was signed. (onnxruntime-genai
 * refuses a graph's name with `..` in it.)
 */
fun runFolder(content: File, target: File, overlay: String): File {
    val link = File(target, "content")
    Files.deleteIfExists(link.toPath()) // before the rest: deleteRecursively would follow it
    target.deleteRecursively()
    val name = "genai_config.json"
    val laid = laidOver(StrictJson.parse(File(content, name).readBytes()), StrictJson.parse(overlay.toByteArray()))
    val graph = listOf("model", "decoder", "filename").fold(laid as Any?) { at, key -> (at as? Map<*, *>)?.get(key) } as? String
        ?: throw NotJson("$name names no graph")
    val found = laidOver(laid, mapOf("model" to mapOf("decoder" to mapOf("filename" to "content/$graph"))))
    write(File(target, name), toJson(found).toByteArray())
    Files.createSymbolicLink(link.toPath(), content.absoluteFile.toPath())
    for (file in content.listFiles().orEmpty().filter { it.name.startsWith("tokenizer") || it.name.startsWith("special_tokens") }) {
        file.copyTo(File(target, file.name))
    }
    return target
}

/** How an answer ended: end, length, heat. */
class Ended(val tokens: Long, val ended: String)

/** Give `say` the pieces of an answer, at most `most`, with a pause between them as heat demands. heat() reads the sensors. */
fun generate(
    model: Model,
    prompt: String,
    governor: Governor,
    most: Long,
    heat: () -> Map<String, Double?>,
    pause: (Long) -> Unit = Thread::sleep,
    say: (String) -> Unit
): Ended {
    governor.observe(heat())
    model.start(prompt, governor.settings)
    var tokens = 0L
    while (true) {
        if (tokens >= most) return Ended(tokens, "length")
        if (tokens >= governor.settings.answerTokens) return Ended(tokens, "heat")
        say(model.next() ?: return Ended(tokens, "end"))
        tokens++
        if (governor.settings.pauseMs > 0) pause(governor.settings.pauseMs)
        governor.observe(heat())
    }
}
