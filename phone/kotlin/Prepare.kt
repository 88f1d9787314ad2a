package modelbundle

// Pack a bundle's slices once after the download, so that weights are mapped: pipeline/prepack/device.py, for an app.

import java.io.File
import java.io.FileOutputStream
import java.io.RandomAccessFile

private const val PREPACKED = "prepacked"
private const val READY = "$PREPACKED/ready.json"
private const val CHUNK = 1L shl 22

/** The disk has too little room; nothing was begun. */
class NoRoom(message: String) : Exception(message)

/** ONNX Runtime here: its version, and what tells this processor from another. */
interface PackingRuntime {
    val version: String
    val processor: String

    /** Open the slice so that ONNX Runtime packs it and saves `<number>.onnx` and `<number>.raw` in `folder`: docs/mapped.md. */
    fun saveSlice(graph: File, number: Int, folder: File)
}

/** The graph to load; `kernels` null: this processor is of no class, or nothing was prepared, and weights are private. */
class Prepared(val graph: String, val kernels: String?)

private class Packed(fields: Map<*, *>) {
    val saved = fields["saved"] as String
    val raw = fields["raw"] as Long
    val kept = (fields["kept"] as List<*>).map { range -> (range as List<*>).map { it as Long } }
    val bytes = fields["bytes"] as Long
    val data = fields["data"] as String
}

private class Kernels(val name: String, fields: Map<*, *>) {
    val graph = fields["graph"] as String
    val slices = (fields["slices"] as List<*>).map { Packed(it as Map<*, *>) }
}

/** Prepares one bundle's content. `free`: bytes free on its disk. */
class Prepare(private val content: File, private val runtime: PackingRuntime, private val free: () -> Long = { content.usableSpace }) {
    private val folder = File(content, PREPACKED)
    private val work = StrictJson.parse(File(content, "prepack.json").readBytes()) as Map<*, *>
    private val graph = work["graph"] as String
    private val slices = (work["slices"] as List<*>).map { it as String }
    private val classes = (work["classes"] as Map<*, *>).map { (name, fields) -> Kernels(name as String, fields as Map<*, *>) }

    init {
        check(work["version"] == 1L) { "prepack.json: version ${work["version"]}, this program reads 1" }
    }

    private fun data(number: Int) = File(folder, "$number.data")

    private fun madeBy() = mapOf(
        "bundle" to hashFile(File(content, "prepack.json")), "onnxruntime" to runtime.version, "processor" to runtime.processor
    )

    /** Pack what is not packed yet. Throws NoRoom. */
    fun run(): Prepared {
        folder.mkdirs()
        val names = slices.indices.map { data(it).name }
        folder.listFiles().orEmpty().filter { it.name !in names }.forEach { it.delete() }
        // The first slice is always packed: it tells what this processor is, and files may have come from another.
        val found = slices.indices.map { if (it == 0 || !data(it).isFile) null else hashFile(data(it)) }
        requireRoom(found)
        var fitting = classes
        for (number in slices.indices) {
            fitting = fitting.filter { it.slices[number].data == found[number] }.ifEmpty { pack(number, fitting) }
            if (fitting.isEmpty()) {
                folder.deleteRecursively()
                return Prepared(graph, null)
            }
        }
        val kernels = fitting.first()
        write(File(content, READY), toJson(mapOf("kernels" to kernels.name) + madeBy()).toByteArray())
        return Prepared(kernels.graph, kernels.name)
    }

    /** The graph to load now: the merged one if `run` came to its end and its files are there, else the bundle's own. */
    fun ready(): Prepared {
        val said = try {
            StrictJson.parse(File(content, READY).readBytes()) as? Map<*, *>
        } catch (error: Exception) { // not prepared, or damaged: prepare again
            null
        }
        val kernels = classes.firstOrNull { it.name == said?.get("kernels") } ?: return Prepared(graph, null)
        // Beyond the end of a mapped file is a bus error, not an exception.
        val whole = kernels.slices.indices.all { data(it).length() == kernels.slices[it].bytes }
        return if (whole && said == madeBy() + ("kernels" to kernels.name)) Prepared(kernels.graph, kernels.name) else Prepared(graph, null)
    }

    /** Write a slice's data; those of the classes `fitting` that it is of. */
    private fun pack(number: Int, fitting: List<Kernels>): List<Kernels> {
        val saved = File(folder, "$number.onnx")
        val raw = File(folder, "$number.raw")
        runtime.saveSlice(File(content, slices[number]), number, folder)
        val digest = hashFile(saved)
        var fits = fitting.filter { it.slices[number].saved == digest && it.slices[number].raw == raw.length() }
        data(number).delete()
        if (fits.isNotEmpty()) {
            keep(raw, fits.first().slices[number].kept, data(number))
            val made = hashFile(data(number))
            fits = fits.filter { it.slices[number].data == made }
        }
        saved.delete()
        raw.delete()
        return fits
    }

    /** Copy ranges (offset in raw, length, offset in data), with zeros between them. */
    private fun keep(raw: File, kept: List<List<Long>>, data: File) {
        val fresh = File("$data.new")
        RandomAccessFile(raw, "r").use { source ->
            FileOutputStream(fresh).use { file ->
                var written = 0L
                for ((offset, length, target) in kept) {
                    file.write(ByteArray((target - written).toInt()))
                    source.seek(offset)
                    for (at in 0 until length step CHUNK) {
                        file.write(ByteArray(minOf(CHUNK, length - at).toInt()).also { source.readFully(it) })
                    }
                    written = target + length
                }
            }
        }
        move(fresh, data)
    }

    private fun requireRoom(found: List<String?>) {
        val peaks = classes.map { kernels ->
            val missing = kernels.slices.filterIndexed { number, packed -> packed.data != found[number] }
            missing.map { it.bytes }.sum() + (missing.map { it.raw }.maxOrNull() ?: 0)
        }
        val needed = peaks.maxOrNull() ?: 0
        if (free() < needed) throw NoRoom("$needed bytes are needed to prepare $graph, ${free()} are free")
    }
}
