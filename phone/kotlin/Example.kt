package modelbundle

// docs/phone.md explains this program part by part. Arguments: ADDRESS FOLDER KEY MODEL RAM_BYTES, and `remove` to end with.

import java.io.File
import java.time.Instant
import kotlin.system.exitProcess

/** Stands for the runtime in this example: it says the question back, word by word. android/Genai.kt is a real one. */
private class Parrot : Model {
    private var words = emptyList<String>().iterator()
    override fun start(prompt: String, settings: Settings) {
        words = prompt.split(" ").iterator()
    }
    override fun next() = if (words.hasNext()) words.next() + " " else null
    override fun close() {}
}

object Example {
    private fun run(address: String, root: File, key: String, model: String, ram: Long, profile: File) {
        // fetch tiers → verify → choose
        val library = Library(root, HttpPlace(address), Asked(listOf(key), appVersion = 1))
        val phone = { Phone("android", ram, Runtime.getRuntime().maxMemory(), maps = false) }
        val tiers = library.tiers(model)
        val choice = tiers.choose(phone())
        val option = choice.option ?: return println("refused: ${choice.refusal?.message}")

        // fetch parts → verify → install; what has not changed since the last release is not fetched again
        val installed = library.install(model, option)
        println("${option.variant} release ${installed.release}: ${installed.downloaded} downloaded, ${installed.reused} reused")

        // prepare → load, or fall back
        val limits = Profile(StrictJson.parse(profile.readBytes()) as Map<*, *>)
        val means = object : Means {
            override val installed = library.installed(model)
            override fun phone() = phone()
            override fun prepare(option: Option): String? = null // Prepare(content, runtime).run().graph, once a download
            override fun load(option: Option, graph: String?): Model {
                val settings = Governor(limits, option.way).settings
                val content = File(library.folder(model, option.variant), "content")
                runFolder(content, File(root, "run"), overlay(option.way, settings, graph)) // what Genai(folder) loads
                return Parrot()
            }
        }
        val answerer = answerOrFallBack(tiers.ranked(phone()), means, cloud = null)
        println("answered by ${answerer.by}")

        // generate → adapt, and write down how it went
        val way = answerer.option?.way ?: return println(answerer.tried.joinToString { "${it.variant}: ${it.why} ${it.message}" })
        val governor = Governor(limits, way)
        val subject = mapOf(
            "device" to "example", "system" to System.getProperty("os.name"), "model" to model, "variant" to option.variant,
            "release" to installed.release, "way" to way.fields, "runtime" to "none: a parrot", "started" to "${Instant.now()}",
            "cold_start_seconds" to null, "warm_start_seconds" to null
        )
        val record = SustainedLoad(subject)
        val began = System.nanoTime()
        val heat = { mapOf("celsius" to null) } // android/Device.kt reads the battery's and the system's headroom
        val ended = generate(answerer.model!!, "say this back to me", governor, most = 64, heat = heat) { piece ->
            print(piece)
            record.sample(mapOf("seconds" to (System.nanoTime() - began) / 1e9, "tokens" to 1, "step" to governor.step))
        }
        println("(${ended.ended})")
        File(root, "sustained.json").writeText(record.json())
    }

    @JvmStatic
    fun main(arguments: Array<String>) {
        val (address, root, key, model, ram) = arguments
        try {
            run(address, File(root), key, model, ram.toLong(), File("phone/profile.json"))
            if ("remove" in arguments) Library(File(root), HttpPlace(address), Asked(listOf(key))).remove(model, "q4")
        } catch (error: FetchError) {
            println("${error.kind}: ${error.message}")
            exitProcess(1)
        }
    }
}
