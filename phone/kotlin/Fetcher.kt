package modelbundle

// The files of a bundle, over connections that break, onto a disk that may be too small, without surprise on the bill.
//
// A file is asked for by the SHA-256 of its bytes, so what an interrupted run left can always be gone on with: whatever
// the server meanwhile did, the digest decides. Everything here blocks: call it from a background thread.

import java.io.ByteArrayOutputStream
import java.io.Closeable
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream
import java.security.MessageDigest

private const val ATTEMPTS = 8 // requests in a row that bring nothing new end a fetch
private const val LONGEST_PAUSE = 60_000L // milliseconds
private const val CHUNK = 1 shl 18
private val PASSING = setOf(408, 425, 429, 500, 502, 503, 504)
private val RANGE = Regex("bytes (\\d+)-\\d+/(\\d+|\\*)")

/** A transfer that broke and may be tried again; `retryAfter` in milliseconds. */
class Interrupted(message: String, val retryAfter: Long = 0) : IOException(message)

/** Why nothing was fetched. kind: disk, metered, missing, interrupted, wrong-size, wrong-bytes, refused, not-accepted. */
class FetchError(val kind: String, message: String) : Exception(message)

/** An answer; `range` and `length` are its headers Content-Range and Content-Length. */
class Reply(
    val status: Int,
    val range: String?,
    val length: Long?,
    val body: InputStream,
    val retryAfter: Long = 0
) : Closeable by body

/** Where bundles are published; adapters implement it over HTTP. Throws IOException where it did not answer. */
interface Place {
    fun get(path: String, start: Long): Reply
}

/** What the system says of the network and the disk. `meteredBytes` may be fetched over a network that costs money. */
open class Network(val meteredBytes: Long = 0) {
    open fun metered(): Boolean = false
    open fun free(folder: File): Long = folder.usableSpace
    open fun pause(milliseconds: Long) = Thread.sleep(milliseconds)
    open fun progress(bytes: Int) {}
}

/** What bringing files here takes: bytes to download, bytes that are here; `copies`: digest → an installed file. */
class FetchPlan(val download: Long, val reused: Long, val copies: Map<String, File>)

internal fun hashFile(file: File) = hashFile(file.toPath())

/** The first byte of a reply to a request from `start` on. `size`: what was signed, null where nobody knows. */
private fun begun(reply: Reply, path: String, start: Long, size: Long?): Long {
    val status = reply.status
    if (status in PASSING) throw Interrupted("HTTP $status", reply.retryAfter)
    if (status == 404 || status == 410) throw FetchError("missing", "$path is not there (HTTP $status)")
    if (status == 416) throw FetchError("wrong-size", "$path ends before byte $start")
    if (status != 200 && status != 206) throw FetchError("refused", "$path: HTTP $status")
    val (begin, total) = if (status == 200) 0L to reply.length else told(reply.range, path, start)
    if (size != null && total != null && total != size) {
        throw FetchError("wrong-size", "$path has $total bytes there, $size were signed")
    }
    return begin
}

private fun told(range: String?, path: String, start: Long): Pair<Long, Long?> {
    val (begin, total) = RANGE.matchEntire(range.orEmpty())?.destructured
        ?: throw FetchError("refused", "$path: asked for byte $start on, got $range")
    if (begin.toLongOrNull() != start) throw FetchError("refused", "$path: asked for byte $start on, got $range")
    return start to total.toLongOrNull()
}

class Fetcher(private val place: Place, private val network: Network) {
    private var left = 0L

    /** Give `use` the bytes of `path` from `start` to `size` (null: to its end), over as many requests as it takes. */
    private fun stream(path: String, start: Long, size: Long?, allow: () -> Unit = {}, use: (ByteArray, Int, Int) -> Unit) {
        var position = start
        var failures = 0
        while (size == null || position < size) {
            val reached = position
            allow()
            try {
                reading { place.get(path, position) }.use { reply ->
                    position = pour(reply.body, position - begun(reply, path, position, size), position, size) { bytes, from, count ->
                        use(bytes, from, count)
                        position += count
                    }
                }
                if (size == null || position == size) return
                throw Interrupted("the answer ended early")
            } catch (error: Interrupted) {
                failures = if (position > reached) 1 else failures + 1
                if (failures >= ATTEMPTS) {
                    val what = "$failures requests brought nothing beyond byte $position: ${error.message}"
                    throw FetchError("interrupted", "$path: $what")
                }
                val growing = if (failures > 1) 500L shl (failures - 2) else 0
                network.pause(minOf(LONGEST_PAUSE, maxOf(error.retryAfter, growing)))
            }
        }
    }

    /** Read a body, but for the first `skip` bytes: a server without Range begins at the first one again. */
    private fun pour(body: InputStream, skip: Long, start: Long, size: Long?, use: (ByteArray, Int, Int) -> Unit): Long {
        val buffer = ByteArray(CHUNK)
        var unwanted = skip
        var position = start
        while (size == null || position < size) {
            val most = if (size == null) CHUNK.toLong() else minOf(CHUNK.toLong(), unwanted + size - position)
            val count = reading { body.read(buffer, 0, most.toInt()) }
            if (count < 0) break
            val skipped = minOf(unwanted, count.toLong()).toInt()
            unwanted -= skipped
            if (count > skipped) use(buffer, skipped, count - skipped)
            position += count - skipped
        }
        return position
    }

    /** What the network throws is an interruption; what the disk throws is not. */
    private fun <T> reading(read: () -> T): T = try {
        read()
    } catch (error: IOException) {
        throw if (error is Interrupted) error else Interrupted(error.toString())
    }

    /** A small file of unknown size, at most `limit` bytes. */
    fun small(path: String, limit: Int): ByteArray {
        val bytes = ByteArrayOutputStream()
        stream(path, 0, null) { chunk, from, count ->
            bytes.write(chunk, from, count)
            if (bytes.size() > limit) throw FetchError("wrong-size", "$path has more than $limit bytes")
        }
        return bytes.toByteArray()
    }

    /** What bringing the files `wanted` into the folder `parts` takes, and what of `installed` can be reused. */
    fun plan(wanted: Map<String, Entry>, parts: File, installed: File? = null): FetchPlan {
        val sizes = wanted.values.associate { it.sha256 to it.size }
        val plausible = installed?.listFiles().orEmpty().filter { it.isFile && it.length() in sizes.values }
        val copies = plausible.associateBy { hashFile(it) }.filterKeys { it in sizes && !File(parts, it).exists() }
        val download = sizes.filterKeys { it !in copies }.map { (sha256, size) -> size - kept(parts, sha256, size) }.sum()
        return FetchPlan(download, sizes.values.sum() - download, copies)
    }

    /** Bytes of a file that an earlier run left. */
    private fun kept(parts: File, sha256: String, size: Long): Long {
        if (File(parts, sha256).exists()) return size
        val there = File(parts, "$sha256.partial").length()
        return if (there > size) 0 else there
    }

    /** Bring all files to `parts`, each under its SHA-256. Disk and network are asked before the first byte moves. */
    fun fetch(wanted: Map<String, Entry>, parts: File, installed: File? = null): FetchPlan {
        parts.mkdirs()
        val digests = wanted.values.map { it.sha256 }
        parts.listFiles().orEmpty().filter { it.name.removeSuffix(".partial") !in digests }.forEach { it.delete() }
        val planned = plan(wanted, parts, installed)
        val needed = planned.download + planned.copies.values.map { it.length() }.sum()
        val free = network.free(parts)
        if (free < needed) throw FetchError("disk", "$needed bytes are needed, $free are free: free ${needed - free} more")
        left = planned.download
        allow()
        for ((sha256, file) in planned.copies) file.copyTo(File(parts, sha256))
        for ((name, entry) in wanted.toSortedMap()) part(name, entry, parts)
        return planned
    }

    /** Refuse to go on where the network costs money and the user did not agree to so much. */
    private fun allow() {
        if (left > network.meteredBytes && network.metered()) {
            val what = "$left bytes are left, ${network.meteredBytes} are allowed over a metered network"
            throw FetchError("metered", what)
        }
    }

    private fun part(name: String, entry: Entry, parts: File) {
        val whole = File(parts, entry.sha256)
        val partial = File(parts, "${entry.sha256}.partial")
        if (whole.exists()) return
        val resumed = kept(parts, entry.sha256, entry.size)
        if (resumed == 0L) partial.delete()
        var actual = append(partial, entry)
        if (actual != entry.sha256 && resumed > 0) {
            partial.delete() // what an earlier run left was wrong: once more from the first byte
            left += entry.size
            actual = append(partial, entry)
        }
        if (actual != entry.sha256) {
            partial.delete()
            throw FetchError("wrong-bytes", "$name: expected sha256 ${entry.sha256}, got $actual; none of it was kept")
        }
        move(partial, whole)
    }

    /** Complete the file `partial`; the SHA-256 of all its bytes. */
    private fun append(partial: File, entry: Entry): String {
        val digest = MessageDigest.getInstance("SHA-256")
        if (partial.exists()) readChunks(partial.toPath()) { bytes, count -> digest.update(bytes, 0, count) }
        try {
            FileOutputStream(partial, true).use { file ->
                stream("blobs/sha256/${entry.sha256}", partial.length(), entry.size, ::allow) { bytes, from, count ->
                    file.write(bytes, from, count)
                    digest.update(bytes, from, count)
                    left -= count
                    network.progress(count)
                }
            }
        } catch (error: FetchError) {
            if (error.kind == "wrong-size") partial.delete()
            throw error
        }
        return hex(digest.digest())
    }
}
