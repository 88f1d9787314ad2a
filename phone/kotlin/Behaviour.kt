package modelbundle

// Runs the behaviour vectors: the folder phone/vectors is the one argument. A line for every case that is answered
// otherwise than expected, then "N of M cases agree"; status 1 unless all do.

import java.io.ByteArrayInputStream
import java.io.File
import java.io.InputStream
import java.io.SequenceInputStream
import java.nio.file.Files
import kotlin.system.exitProcess

private typealias Fields = Map<*, *>

private fun Fields.map(key: String) = this[key] as Fields? ?: emptyMap<String, Any?>()
private fun Fields.list(key: String) = this[key] as List<*>? ?: emptyList<Any?>()
private fun Fields.text(key: String) = this[key] as String
private fun Fields.long(key: String, otherwise: Long = 0) = this[key] as Long? ?: otherwise
private fun bytesOf(file: Any?) = ((file as Fields).text("text").repeat(file.long("times").toInt())).toByteArray(Charsets.ISO_8859_1)
private fun way(case: Fields) = Way(case.map("way"))

private fun <T> inFolder(use: (File) -> T): T {
    val folder = Files.createTempDirectory("phone-").toFile()
    return try {
        use(folder)
    } finally {
        folder.deleteRecursively()
    }
}

private fun phone(fields: Fields) = Phone(
    fields.text("platform"), fields.long("ram_bytes"), fields.long("available_bytes"), fields["resident_bytes"] as Long?,
    fields["maps"] as Boolean
)

private fun chooses(case: Fields, shared: Fields): Any? {
    val choice = Tiers(shared).choose(phone(case.map("device")))
    val option = choice.option
        ?: return mapOf("refused" to choice.refusal?.kind, "missing_bytes" to choice.refusal?.missingBytes)
    return mapOf("variant" to option.variant, "tier" to option.tier, "weights" to option.way.weights)
}

private class Spoken(private val pieces: Long, private val started: (Settings) -> Unit) : Model {
    private var said = 0L
    override fun start(prompt: String, settings: Settings) = started(settings)
    override fun next() = if (said++ < pieces) "word" else null
    override fun close() {}
}

private fun fallsBack(case: Fields, shared: Fields): Any? {
    val means = object : Means {
        override val installed = case.list("installed").map { it as String }
        override fun phone() = phone(case.map("device"))
        override fun prepare(option: Option) = if (case["kernels"] as Boolean) "mapped.onnx" else null
        override fun load(option: Option, graph: String?): Model {
            check(listOf(option.variant, option.way.weights) !in case.list("broken")) { "it does not load" }
            return Spoken(0) {}
        }
    }
    val cloud = { if (case["cloud"] == "fails") error("no answer") else "an answer" }
    val options = Tiers(shared).ranked(means.phone())
    val found = answerOrFallBack(options, means, if (case["cloud"] == "forbidden") null else cloud)
    val tried = found.tried.map { listOf(it.variant, it.weights, it.why) }
    return mapOf("by" to found.by, "variant" to found.option?.variant, "weights" to found.option?.way?.weights, "tried" to tried)
}

private fun heats(case: Fields, shared: Fields): Any? {
    val governor = Governor(Profile(shared.map("profile")), way(case))
    val steps = case.list("readings").map { reading ->
        governor.observe((reading as Fields).map { (name, value) -> (name as String) to value?.let { double(it) } }.toMap()).toLong()
    }
    val (threads, chunk, tokens, pause) = governor.settings
    val settings = mapOf("threads" to threads, "prefill_chunk" to chunk, "answer_tokens" to tokens, "pause_ms" to pause)
    return mapOf("steps" to steps, "settings" to settings)
}

private fun answers(case: Fields, shared: Fields): Any? {
    val left = ArrayDeque(case.list("celsius").map { double(it) })
    var last = 0.0
    var paused = 0L
    var started: Any? = null
    val model = Spoken(case.long("pieces")) { started = mapOf("threads" to it.threads, "prefill_chunk" to it.prefillChunk) }
    val heat = {
        last = left.removeFirstOrNull() ?: last
        mapOf("celsius" to last)
    }
    val governor = Governor(Profile(shared.map("profile")), way(case))
    val ended = generate(model, "a question", governor, case.long("most"), heat, { paused += it }) {}
    return mapOf("tokens" to ended.tokens, "ended" to ended.ended, "paused_ms" to paused, "started" to started)
}

private fun overlays(case: Fields, shared: Fields): Any? {
    val given = case.map("settings")
    val settings = Settings(
        given.long("threads"), given.long("prefill_chunk"), given.long("answer_tokens"), given.long("pause_ms")
    )
    return StrictJson.parse(overlay(way(case), settings, case["graph"] as String?).toByteArray())
}

private fun records(case: Fields, shared: Fields): Any? = inFolder { folder ->
    val state = File(folder, "releases.json")
    (case["file"] as String?)?.let { state.writeText(it) }
    val outcomes = case.list("record").map { entry ->
        val (subject, release) = entry as List<*>
        try {
            Releases(state).record(subject as String, release as Long)
            "ok"
        } catch (error: StateError) {
            error.kind
        }
    }
    val releases = if ("unreadable" in outcomes) null else (StrictJson.parse(state.readBytes()) as Fields)["releases"]
    mapOf("outcomes" to outcomes, "releases" to releases)
}

/** A place that answers as a case says, and remembers what it was asked for. */
private class Told(case: Fields, private val requests: MutableList<Any?>) : Place {
    private class Blob(val name: String, val bytes: ByteArray, val steps: ArrayDeque<Fields>)

    private val blobs = LinkedHashMap<String, Blob>()

    init {
        for ((name, file) in case.map("files")) {
            val steps = case.map("answers").list(name as String).flatMap { step ->
                List((step as Fields).long("times", 1).toInt()) { step }
            }
            blobs.getOrPut("blobs/sha256/${sha256(bytesOf(file))}") { Blob(name, bytesOf(file), ArrayDeque(steps)) }
        }
    }

    override fun get(path: String, start: Long): Reply {
        val blob = blobs.getValue(path)
        requests.add(listOf(blob.name, start))
        val step = blob.steps.removeFirstOrNull() ?: emptyMap<String, Any?>()
        if (step["silent"] == true) throw Interrupted("no connection")
        val from = if (step["no_range"] == true) 0 else start
        val total = step.long("claim", blob.bytes.size.toLong())
        val body = blob.bytes.copyOf()
        (step["flip"] as Long?)?.let { body[it.toInt()] = (body[it.toInt()].toInt() xor 1).toByte() }
        val status = (step["status"] as Long? ?: if (from > 0 || "range" in step) 206L else 200L).toInt()
        val range = if (status == 206) step["range"] as String? ?: "bytes $from-${total - 1}/$total" else null
        return Reply(status, range, total, pieces(body.drop(from.toInt()).toByteArray(), step["cut"] as Long?))
    }

    private fun pieces(body: ByteArray, cut: Long?): InputStream {
        if (cut == null) return ByteArrayInputStream(body)
        val broken = object : InputStream() {
            override fun read(): Int = throw Interrupted("cut")
        }
        return SequenceInputStream(ByteArrayInputStream(body.copyOf(cut.toInt())), broken)
    }
}

private fun lay(folder: File, case: Fields) {
    for ((name, file) in case.map("installed")) write(File(folder, "installed/$name"), bytesOf(file))
    for ((name, rest) in case.map("left")) {
        val whole = case.map("files")[name]?.let { bytesOf(it) } ?: "of another release".toByteArray()
        val spoilt = if ((rest as Fields)["spoilt"] == true) 1 else 0
        val kept = whole.copyOf(rest.long("bytes").toInt()).map { (it.toInt() xor spoilt).toByte() }.toByteArray()
        write(File(folder, "parts/${sha256(whole)}.partial"), kept)
    }
}

private fun fetches(case: Fields, shared: Fields): Any? = inFolder { folder ->
    lay(folder, case)
    val wanted = case.map("files").map { (name, file) ->
        (name as String) to Entry(bytesOf(file).size.toLong(), sha256(bytesOf(file)))
    }.toMap()
    val requests = ArrayList<Any?>()
    val pauses = ArrayList<Any?>()
    val states = ArrayDeque(case.list("metered").ifEmpty { listOf(false) }.map { it as Boolean })
    val network = object : Network(case.long("metered_bytes")) {
        override fun metered() = if (states.size > 1) states.removeFirst() else states.first()
        override fun free(folder: File) = case.long("free", Long.MAX_VALUE)
        override fun pause(milliseconds: Long) {
            pauses.add(milliseconds)
        }
    }
    val fetcher = Fetcher(Told(case, requests), network)
    val parts = File(folder, "parts")
    val installed = File(folder, "installed")
    val plan = fetcher.plan(wanted, parts, installed)
    val outcome = try {
        fetcher.fetch(wanted, parts, installed)
        if (wanted.values.all { hashFile(File(parts, it.sha256)) == it.sha256 }) "ok" else "not there"
    } catch (error: FetchError) {
        error.kind
    }
    val left = parts.listFiles().orEmpty().filter { it.name.endsWith(".partial") }.associate { file ->
        wanted.entries.first { file.name.startsWith(it.value.sha256) }.key to file.length()
    }
    mapOf(
        "outcome" to outcome, "download" to plan.download, "reused" to plan.reused, "requests" to requests, "left" to left,
        "pauses" to pauses
    )
}

private fun prepares(case: Fields, shared: Fields): Any? = inFolder { folder ->
    write(File(folder, "prepack.json"), toJson(shared["prepack"]).toByteArray())
    for ((name, text) in case.map("before")) write(File(folder, "prepacked/$name"), (text as String).toByteArray(Charsets.ISO_8859_1))
    val packs = ArrayList<Any?>()
    val runtime = object : PackingRuntime {
        override val version = "1.32.0"
        override val processor = "one"
        override fun saveSlice(graph: File, number: Int, folder: File) {
            packs.add(number.toLong())
            val saved = case.list("saves")[number] as Fields
            write(File(folder, "$number.onnx"), saved.text("graph").toByteArray())
            write(File(folder, "$number.raw"), saved.text("raw").toByteArray())
        }
    }
    val prepare = Prepare(folder, runtime) { case.long("free") }
    val found = try {
        prepare.run()
    } catch (error: NoRoom) {
        null
    }
    val files = File(folder, "prepacked").listFiles().orEmpty().filter { it.name != "ready.json" }
        .associate { it.name to it.readText(Charsets.ISO_8859_1) }
    val then = prepare.ready().graph
    mapOf("graph" to found?.graph, "kernels" to found?.kernels, "packs" to packs, "files" to files, "then" to then)
}

// --- policy.json has three lists, and defaults that a case may change --------------------------------------------------

private fun decides(case: Fields, shared: Fields): Any? {
    val situation = shared.map("defaults").map("situation") + case.map("situation")
    val limits = shared.map("defaults").map("limits") + case.map("limits")
    val now = Situation(
        situation.text("network"), situation["battery"]?.let { double(it) }, situation["charging"] as Boolean,
        situation.text("heat"), situation["device_ready"] as Boolean
    )
    val bounds = Limits(
        limits.long("low"), limits.long("high"), limits.long("threshold"), limits.long("turns"), double(limits["battery"]),
        limits.text("heat"), limits["metered"] as Boolean
    )
    val made = decide(Request(case.text("mode"), case.long("tokens"), case.long("turns"), case["private"] as Boolean, now, bounds))
    return mapOf("rule" to made.rule, "first" to made.first, "then" to made.then, "level" to made.level)
}

private fun doubted(case: Fields, shared: Fields): Any? =
    doubts(case.list("logprobs").map { double(it) }, case.long("tokens").toInt(), double(case["threshold"]))

private fun kept(case: Fields, shared: Fields): Any? =
    isPrivate(case.list("tags").map { it as String }, case.map("known").map { (tag, place) -> (tag as String) to (place as String) }.toMap())

private val RUNS: Map<String, Map<String, (Fields, Fields) -> Any?>> = mapOf(
    "answer" to mapOf("cases" to ::answers),
    "choose" to mapOf("cases" to ::chooses),
    "fall_back" to mapOf("cases" to ::fallsBack),
    "fetch" to mapOf("cases" to ::fetches),
    "heat" to mapOf("cases" to ::heats),
    "overlay" to mapOf("cases" to ::overlays),
    "policy" to mapOf("decisions" to ::decides, "doubts" to ::doubted, "tags" to ::kept),
    "prepare" to mapOf("cases" to ::prepares),
    "releases" to mapOf("cases" to ::records)
)

/** Named apart, so that one program holds both runners. */
object Behaviour {
    @JvmStatic
    fun main(arguments: Array<String>) {
        var agree = 0
        var all = 0
        for (file in File(arguments[0]).listFiles().orEmpty().sorted()) {
            val shared = StrictJson.parse(file.readBytes()) as Fields
            val kind = file.nameWithoutExtension
            for ((list, run) in RUNS.getValue(kind)) for (case in shared.list(list)) {
                val expected = (case as Fields)["expect"]
                val found = run(case, shared)
                all++
                if (found == expected) agree++
                else println("$kind: ${case["name"]}: expected ${toJson(expected)}, found ${toJson(found)}")
            }
        }
        println("$agree of $all cases agree")
        exitProcess(if (agree == all && all > 0) 0 else 1)
    }
}
