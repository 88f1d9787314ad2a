package modelbundle

// Runs test vectors: the folder that `python -m pipeline vectors FOLDER` wrote is the one argument. A line for every
// vector that is answered otherwise than expected, then "N of M vectors agree"; status 1 unless all do.

import java.io.File
import java.time.Instant
import kotlin.system.exitProcess

private fun question(vector: Map<*, *>) = Question(
    pinnedKeys = (vector["pinned_keys"] as List<*>).map { it as String },
    now = Instant.parse(vector["now"] as String),
    highestRelease = vector["highest_release"] as Long?,
    allowDevelopment = vector["allow_development"] as Boolean,
    appVersion = vector["app_version"] as Long?,
    tier = vector["tier"] as String?,
    model = vector["model"] as String?,
    variant = vector["variant"] as String?,
    kind = vector["kind"] as String
)

fun main(arguments: Array<String>) {
    val folders = File(arguments[0]).listFiles().orEmpty().sorted()
    var agree = 0
    for (folder in folders) {
        val vector = StrictJson.parse(File(folder, "vector.json").readBytes()) as Map<*, *>
        val expected = (vector["findings"] as List<*>).map { (it as List<*>).joinToString(": ") }.sorted()
        val answer = BundleVerifier.verify(File(folder, "bundle"), question(vector))
        val found = answer.findings.map { "${it.kind}: ${it.file}" }.distinct().sorted()
        if (found == expected) agree++ else println("${folder.name}: expected $expected, found $found")
    }
    println("$agree of ${folders.size} vectors agree")
    exitProcess(if (agree == folders.size && agree > 0) 0 else 1)
}
