package modelbundle

// What is installed, what may be, and what was the highest release: fetch, verify, install, update, remove.
//
//     ROOT/releases.json                  the highest release accepted of each subject, MODEL/VARIANT or MODEL for its tiers
//     ROOT/MODEL/VARIANT/                 the bundle in use: content/, model.sig
//     ROOT/MODEL/VARIANT.partial/         what an interrupted fetch left for the next
//
// Nothing is used before it is proven, and a bundle appears whole or not at all.

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.nio.channels.FileChannel
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardCopyOption.ATOMIC_MOVE
import java.nio.file.StandardOpenOption.READ
import java.time.Instant

private const val PREPACKED = "content/prepacked" // made by the phone, so not part of what was signed
private val SUBJECT = Regex("[a-z0-9_-]+(/[a-z0-9_-]+)?")

/** Put on the disk what was written of a file or folder. (Not every system opens a folder: then there is nothing to do.) */
private fun sync(path: Path) {
    try {
        FileChannel.open(path, READ).use { it.force(true) }
    } catch (error: IOException) {
        if (!Files.isDirectory(path)) throw error
    }
}

/** Rename; on the disk before the new name is. */
internal fun move(from: File, to: File) {
    if (!from.exists()) return
    sync(from.toPath())
    Files.move(from.toPath(), to.toPath(), ATOMIC_MOVE)
    sync(to.absoluteFile.parentFile.toPath())
}

/** Write a file that appears whole. */
internal fun write(file: File, bytes: ByteArray) {
    file.absoluteFile.parentFile.mkdirs()
    val fresh = File("$file.new")
    FileOutputStream(fresh).use { it.write(bytes) }
    move(fresh, file)
}

/** The state file is damaged, or a release is lower than one that was accepted. kind: unreadable, rollback. */
class StateError(val kind: String, message: String) : Exception(message)

/** The highest release ever accepted of each subject. A missing file remembers nothing; a damaged one is an error. */
class Releases(private val file: File) {
    fun highest(subject: String): Long? = read()[subject]

    fun record(subject: String, release: Long) {
        val releases = read()
        val known = releases[subject] ?: release
        if (release < known) {
            throw StateError("rollback", "release $known of $subject was accepted before, $release is a rollback")
        }
        if (releases[subject] != release) {
            write(file, toJson(mapOf("releases" to releases + (subject to release))).toByteArray())
        }
    }

    private fun read(): Map<String, Long> {
        if (!file.exists()) return emptyMap()
        val parsed = try {
            StrictJson.parse(file.readBytes())
        } catch (error: NotJson) {
            null
        }
        val releases = (parsed as? Map<*, *>)?.get("releases") as? Map<*, *>
        if (releases == null || parsed.size != 1 || !releases.all { SUBJECT.matches(it.key as String) && it.value is Long }) {
            throw StateError("unreadable", "$file is no record of releases: without it a rollback cannot be seen")
        }
        return releases.map { (subject, release) -> (subject as String) to (release as Long) }.toMap()
    }
}

/** What every signature is judged by. */
class Asked(
    val pinnedKeys: List<String>,
    val appVersion: Long? = null,
    val allowDevelopment: Boolean = false,
    val now: () -> Instant = Instant::now
)

/** What is installed now, and where its bytes came from. */
class Installed(val folder: File, val release: Long, val downloaded: Long, val reused: Long)

/** Bundles under one folder. Everything here blocks: call it from a background thread. */
class Library(private val root: File, place: Place, private val asked: Asked, network: Network = Network()) {
    private val fetcher = Fetcher(place, network)
    val releases = Releases(File(root, "releases.json"))

    fun folder(model: String, variant: String) = File(root, "$model/$variant")

    /** The newest signed tiers.json of a model. */
    fun tiers(model: String): Tiers {
        val folder = File(root, "$model/.tiers")
        layOut(folder, "tiers/$model/latest.sig", "tiers.json", null)
        val document = accept(folder, model, null, "tiers")
        releases.record(model, document.release)
        return Tiers(document.fields)
    }

    /** Variants of a model that are here. */
    fun installed(model: String): List<String> = File(root, model).listFiles().orEmpty()
        .filter { '.' !in it.name && File(it, "model.sig").isFile }.map { it.name }.sorted()

    /**
     * Bring an option's bundle here, or up to date: what has not changed is copied, the rest is fetched. On any error
     * what was installed stays.
     */
    fun install(model: String, option: Option): Installed {
        val variant = option.variant
        val target = folder(model, variant)
        val staging = File("$target.partial")
        val bundle = File(staging, "bundle")
        recover(target)
        layOut(bundle, "bundles/$model/$variant/${option.release}/model.sig", "release.json", option.signatureSha256)
        val document = accept(bundle, model, variant, passing = "missing")
        val there = File(target, "model.sig")
        val same = there.isFile && hashFile(there) == option.signatureSha256
        if (same && findings(target, model, variant).isEmpty()) return finish(target, "$model/$variant", option.release, 0, 0)
        val parts = File(staging, "parts")
        val fetched = fetcher.fetch(document.files, parts, File(target, "content"))
        assemble(document.files, parts, File(bundle, "content"))
        accept(bundle, model, variant)
        move(target, File("$target.old"))
        move(bundle, target)
        return finish(target, "$model/$variant", option.release, fetched.download, fetched.reused)
    }

    /** Give an installed bundle's space back. Its highest release stays in the state: an older one remains a rollback. */
    fun remove(model: String, variant: String) {
        for (end in listOf("", ".old", ".partial")) File("${folder(model, variant)}$end").deleteRecursively()
    }

    /** Fetch a signature and, by the digest that it proves, its document, into a folder of their own. */
    private fun layOut(folder: File, path: String, name: String, pin: String?) {
        val signature = fetcher.small(path, SMALL)
        if (pin != null && sha256(signature) != pin) {
            throw FetchError("not-accepted", "$path is not the signature that tiers.json pins, $pin")
        }
        val digests = try {
            BundleVerifier.openSignature(signature, asked.pinnedKeys)
        } catch (error: Exception) { // for whichever reason it proves nothing
            throw FetchError("not-accepted", "$path: ${error.message}")
        }
        val digest = digests[name] ?: throw FetchError("not-accepted", "$path signs no $name")
        val raw = fetcher.small("blobs/sha256/$digest", SMALL)
        if (sha256(raw) != digest) throw FetchError("wrong-bytes", "$path: wrong bytes for $name")
        folder.deleteRecursively()
        write(File(folder, "model.sig"), signature)
        write(File(folder, "content/$name"), raw)
    }

    private fun answer(folder: File, model: String, variant: String?, kind: String): Answer {
        val highest = releases.highest(if (variant == null) model else "$model/$variant")
        val question = Question(
            asked.pinnedKeys, asked.now(), highest, asked.allowDevelopment, asked.appVersion, null, model, variant, kind
        )
        return BundleVerifier.verify(folder, question)
    }

    /** What is wrong with an installed bundle; empty if nothing is. */
    fun findings(folder: File, model: String, variant: String): List<Finding> =
        answer(folder, model, variant, "bundle").findings.filter { it.file != PREPACKED }

    private fun accept(folder: File, model: String, variant: String?, kind: String = "bundle", passing: String? = null): Document {
        val answer = answer(folder, model, variant, kind)
        val wrong = answer.findings.filter { it.kind != passing }
        if (wrong.isEmpty() && answer.document != null) return answer.document
        throw FetchError("not-accepted", wrong.joinToString("; ") { "${it.kind}: ${it.file}: ${it.message}" })
    }

    /** Parts under their names. (Android denies hard links, so a part is moved, and copied only where two names share it.) */
    private fun assemble(files: Map<String, Entry>, parts: File, content: File) {
        for ((sha256, names) in files.keys.groupBy { files.getValue(it).sha256 }) {
            for (name in names.drop(1)) File(parts, sha256).copyTo(File(content, name), overwrite = true)
            move(File(parts, sha256), File(content, names.first()))
        }
    }

    /** Put back what a run moved aside that was killed between two renames. */
    private fun recover(target: File) {
        val aside = File("$target.old")
        if (!File(target, "model.sig").isFile) move(aside, target)
        aside.deleteRecursively()
    }

    private fun finish(target: File, subject: String, release: Long, downloaded: Long, reused: Long): Installed {
        releases.record(subject, release)
        for (end in listOf(".old", ".partial")) File("$target$end").deleteRecursively()
        return Installed(target, release, downloaded, reused)
    }
}
