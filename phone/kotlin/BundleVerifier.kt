package modelbundle

// Is this bundle what its maker signed, and may this app take it now? Copy this file and StrictJson.kt.
//
// The JDK and nothing else; on Android from API 26. The order is the defence: names, then the signature over the bytes as
// they lie, with pinned keys, then every file's SHA-256, and only then is release.json read, from bytes whose digest was
// signed. docs/trust.md says what an app must pin and remember; Vectors.kt runs the test vectors. A field of release.json
// that this file does not know is ignored: raise min_app_version when an app must know it.

import java.io.File
import java.nio.ByteBuffer
import java.nio.channels.SeekableByteChannel
import java.nio.file.Files
import java.nio.file.LinkOption
import java.nio.file.OpenOption
import java.nio.file.Path
import java.nio.file.StandardOpenOption
import java.nio.file.attribute.BasicFileAttributes
import java.security.GeneralSecurityException
import java.security.KeyFactory
import java.security.MessageDigest
import java.security.PublicKey
import java.security.Signature
import java.security.interfaces.ECPublicKey
import java.security.spec.X509EncodedKeySpec
import java.time.DateTimeException
import java.time.Instant
import java.util.Base64

internal const val SMALL = 16 shl 20 // bytes; no signature or document comes near it
private const val CHUNK = 1 shl 20
private const val CLOCK_SKEW = 24L * 3600 // seconds that two honest clocks may differ by
private const val CONTENT = "content"
private const val SIGNATURE = "model.sig"
private const val RELEASE = "release.json"
private const val REFUSAL = "refusal.json"
private const val TIERS = "tiers.json"
private const val PAYLOAD_TYPE = "application/vnd.in-toto+json"
private const val P256_ORDER = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551"

/** One thing that is wrong; `kind` and `file` are those of `python -m pipeline verify`. */
data class Finding(val kind: String, val file: String, val message: String)

/** What the app asks. Keys are base64 DER SubjectPublicKeyInfo on P-256: pin the current and the next one. */
class Question(
    val pinnedKeys: List<String>,
    val now: Instant = Instant.now(),
    val highestRelease: Long? = null,
    val allowDevelopment: Boolean = false,
    val appVersion: Long? = null,
    val tier: String? = null,
    val model: String? = null,
    val variant: String? = null,
    /** "bundle" or "tiers" */
    val kind: String = "bundle"
)

/** Nothing in the folder may be used unless `ok`; then store `document.release` as the model's highest. */
class Answer(val findings: List<Finding>, val signer: String?, val document: Document?) {
    val ok: Boolean get() = findings.isEmpty()
}

/** What was read of release.json, refusal.json or tiers.json. */
class Document internal constructor(val fields: Map<*, *>, val name: String) {
    val model = fields["model"] as String
    val variant = fields["variant"] as String?
    val release = fields["release"] as Long
    val channel = fields["channel"] as String
    val created: Instant = Instant.parse(fields["created"] as String)
    val expires: Instant = Instant.parse(fields["expires"] as String)
    val minAppVersion = fields["min_app_version"] as Long
    val maxAppVersion = fields["max_app_version"] as Long?
    val nextKeyId = fields["next_key_id"] as String?
    internal val key = members(fields["key"], mapOf("id" to ::isSha256, "kind" to oneOf("development", "release")), "key")
    val tiers: List<String> = (fields["tiers"] as Map<*, *>?).orEmpty().keys.map { it as String }
    internal val reasons = (fields["reasons"] as List<*>?).orEmpty().map { it as String }
    val files: Map<String, Entry> = (fields["files"] as Map<*, *>?).orEmpty().map { (file, entry) ->
        if (!isFileName(file)) throw Malformed("files: $file is no file name")
        val listed = members(entry, mapOf("size" to atLeast(0), "sha256" to ::isSha256), "files: $file")
        (file as String) to Entry(listed["size"] as Long, listed["sha256"] as String)
    }.toMap()

    init {
        if (name == RELEASE && files.isEmpty()) throw Malformed("it lists no files")
    }
}

/** A file as it was signed: bytes, and the SHA-256 of them. */
class Entry(val size: Long, val sha256: String)

/** Malformed input; its message becomes a finding. */
internal class Malformed(message: String) : Exception(message)

/** A signature that proves nothing; `kind` says why. */
private class Unproven(val kind: String, message: String) : Exception(message)

// --- checks of parsed JSON -------------------------------------------------------------------------------------------

private typealias Check = (Any?) -> Boolean

private val SHA256 = Regex("[0-9a-f]{64}")
private val NAME = Regex("[a-z0-9][a-z0-9_-]{0,39}")
private val FILE_NAME = Regex("[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
private val TIME = Regex("\\d{4}-\\d\\d-\\d\\dT([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\dZ")

private fun isText(value: Any?) = value is String
private fun isObject(value: Any?) = value is Map<*, *>
private fun isName(value: Any?) = value is String && NAME.matches(value)
private fun isSha256(value: Any?) = value is String && SHA256.matches(value)
private fun isFileName(value: Any?) = value is String && FILE_NAME.matches(value)
private fun oneOf(vararg allowed: Any?): Check = { it in allowed }
private fun atLeast(least: Long): Check = { it is Long && it >= least }
private fun orAbsent(check: Check): Check = { it == null || check(it) }
private fun listOfAtLeast(least: Int, check: Check): Check = { it is List<*> && it.size >= least && it.all(check) }
private fun listOfExactly(size: Int): Check = { it is List<*> && it.size == size }

private fun isTime(value: Any?): Boolean = try {
    value is String && TIME.matches(value) && Instant.parse(value).toString() == value
} catch (error: DateTimeException) {
    false
}

/** An object's members, checked one by one; with `exact`, no others are allowed. */
private fun members(value: Any?, checks: Map<String, Check>, where: String, exact: Boolean = true): Map<*, *> {
    if (value !is Map<*, *>) throw Malformed("$where is not an object")
    if (exact) value.keys.firstOrNull { it !in checks.keys }?.let { throw Malformed("$where: unknown field $it") }
    for ((key, check) in checks) if (!check(value[key])) throw Malformed("$where: $key is missing or not valid")
    return value
}

internal fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }

private fun unhex(text: String) = ByteArray(text.length / 2) { text.substring(2 * it, 2 * it + 2).toInt(16).toByte() }

internal fun sha256(bytes: ByteArray): String = hex(MessageDigest.getInstance("SHA-256").digest(bytes))

/** ASCII lower case: the names that reach it hold nothing else. */
private fun folded(name: String) = String(CharArray(name.length) { if (name[it] in 'A'..'Z') name[it] + 32 else name[it] })

// --- the signature ---------------------------------------------------------------------------------------------------

private class Pin(encoded: String) {
    private val der: ByteArray = Base64.getDecoder().decode(encoded)
    val key: PublicKey = KeyFactory.getInstance("EC").generatePublic(X509EncodedKeySpec(der))
    val id = sha256(der)
    val hint = sha256(pem().toByteArray(Charsets.UTF_8))

    init {
        require((key as ECPublicKey).params.order.toString(16) == P256_ORDER) { "a pinned key is not on P-256" }
    }

    private fun pem(): String {
        val lines = Base64.getEncoder().encodeToString(der).chunked(64).joinToString("\n")
        return "-----BEGIN PUBLIC KEY-----\n$lines\n-----END PUBLIC KEY-----\n"
    }

    fun signed(message: ByteArray, signature: ByteArray): Boolean = try {
        val verifier = Signature.getInstance("SHA256withECDSA")
        verifier.initVerify(key)
        verifier.update(message)
        verifier.verify(signature)
    } catch (error: GeneralSecurityException) { // a signature that is no DER
        false
    }
}

private class Envelope(val keyid: String, val hint: String, val payload: ByteArray, val signature: ByteArray)

private fun base64(value: Any?, what: String): ByteArray {
    val bytes = try {
        Base64.getDecoder().decode(value as String)
    } catch (error: IllegalArgumentException) {
        throw Malformed("its $what is not base64")
    }
    if (Base64.getEncoder().encodeToString(bytes) != value) throw Malformed("its $what is not base64")
    return bytes
}

private fun readEnvelope(raw: ByteArray): Envelope {
    val mediaType = oneOf("application/vnd.dev.sigstore.bundle.v0.3+json")
    val file = members(
        StrictJson.parse(raw),
        mapOf("mediaType" to mediaType, "verificationMaterial" to ::isObject, "dsseEnvelope" to ::isObject),
        "the file"
    )
    val material = members(
        file["verificationMaterial"], mapOf("publicKey" to ::isObject, "tlogEntries" to listOfExactly(0)), "the material"
    )
    val hint = members(material["publicKey"], mapOf("hint" to ::isSha256), "the public key")["hint"] as String
    val envelope = members(
        file["dsseEnvelope"],
        mapOf("payload" to ::isText, "payloadType" to oneOf(PAYLOAD_TYPE), "signatures" to listOfExactly(1)),
        "the envelope"
    )
    val first = (envelope["signatures"] as List<*>).first()
    val proof = members(first, mapOf("sig" to ::isText, "keyid" to ::isText), "the signature")
    val payload = base64(envelope["payload"], "payload")
    return Envelope(proof["keyid"] as String, hint, payload, base64(proof["sig"], "signature"))
}

/** DSSE's pre-authentication encoding: the bytes that are signed. */
private fun pae(payload: ByteArray): ByteArray =
    "DSSEv1 ${PAYLOAD_TYPE.length} $PAYLOAD_TYPE ${payload.size} ".toByteArray(Charsets.UTF_8) + payload

/** The pinned key that signed, and the statement's bytes, unread. */
private fun authenticate(raw: ByteArray, pinned: List<Pin>): Pair<String, ByteArray> {
    val envelope = readEnvelope(raw)
    val message = pae(envelope.payload)
    val signer = pinned.firstOrNull { it.signed(message, envelope.signature) }
    if (signer == null) {
        val named = "it names the key ${envelope.keyid}"
        if (pinned.none { it.id == envelope.keyid }) throw Unproven("other-key", "$named, which is not pinned")
        throw Unproven("invalid-signature", "$named, but that key did not sign this statement")
    }
    if (envelope.keyid != signer.id || envelope.hint != signer.hint) {
        throw Malformed("the key ${signer.id} signed it, but it names another (its label was changed)")
    }
    return Pair(signer.id, envelope.payload)
}

/** The signed digests, file name → SHA-256, of an authenticated statement. */
private fun readStatement(payload: ByteArray): Map<String, String> {
    val statement = members(
        StrictJson.parse(payload),
        mapOf(
            "_type" to oneOf("https://in-toto.io/Statement/v1"),
            "subject" to listOfExactly(1),
            "predicateType" to oneOf("https://model_signing/signature/v1.0"),
            "predicate" to ::isObject
        ),
        "the signed statement"
    )
    val first = (statement["subject"] as List<*>).first()
    val subject = members(first, mapOf("name" to ::isText, "digest" to ::isObject), "the subject")
    val root = members(subject["digest"], mapOf("sha256" to ::isSha256), "the subject's digest")["sha256"]
    val predicate = members(
        statement["predicate"],
        mapOf("serialization" to ::isObject, "resources" to listOfAtLeast(1, ::isObject)),
        "the predicate"
    )
    val how = mapOf("method" to oneOf("files"), "hash_type" to oneOf("sha256"), "allow_symlinks" to oneOf(false))
    members(predicate["serialization"], how, "the serialization")
    val digests = LinkedHashMap<String, String>()
    val names = HashSet<String>()
    val all = MessageDigest.getInstance("SHA-256")
    val form = mapOf("name" to ::isFileName, "algorithm" to oneOf("sha256"), "digest" to ::isSha256)
    for (resource in predicate["resources"] as List<*>) {
        val entry = members(resource, form, "a resource")
        val name = entry["name"] as String
        if (!names.add(folded(name))) throw Malformed("two signed names are $name, but for case")
        digests[name] = entry["digest"] as String
        all.update(unhex(entry["digest"] as String))
    }
    if (hex(all.digest()) != root) throw Malformed("the root digest is not that of the files")
    return digests
}

// --- the signed document ---------------------------------------------------------------------------------------------

private const val FORMAT = 2L
private val STAMP: Map<String, Check> = mapOf(
    "model" to ::isName,
    "release" to atLeast(1),
    "channel" to oneOf("development", "release"),
    "created" to ::isTime,
    "expires" to ::isTime,
    "min_app_version" to atLeast(0),
    "max_app_version" to orAbsent(atLeast(Long.MIN_VALUE)),
    "key" to ::isObject,
    "next_key_id" to orAbsent(::isSha256)
)
private val FORMS: Map<String, Map<String, Check>> = mapOf(
    RELEASE to mapOf(
        "kind" to oneOf(null, "release"),
        "variant" to ::isName,
        "tiers" to ::isObject,
        "files" to ::isObject
    ),
    REFUSAL to mapOf(
        "kind" to oneOf(null, "refusal"), "variant" to ::isName, "reasons" to listOfAtLeast(1, ::isText)
    ),
    TIERS to mapOf("kind" to oneOf(null, "tiers"), "tiers" to ::isObject)
)

private fun readDocument(raw: ByteArray, name: String): Document {
    val parsed = StrictJson.parse(raw)
    if (parsed is Map<*, *> && parsed["format"] != FORMAT) {
        throw Malformed("it is of format ${parsed["format"] ?: 1}; this verifier reads $FORMAT: fetch a release made for it")
    }
    val fields = members(parsed, STAMP + FORMS.getValue(name), "it", exact = false)
    if (!fields.containsKey("max_app_version")) throw Malformed("it: max_app_version is missing")
    return Document(fields, name)
}

// --- the folder ------------------------------------------------------------------------------------------------------

private fun attributes(path: Path): BasicFileAttributes =
    Files.readAttributes(path, BasicFileAttributes::class.java, LinkOption.NOFOLLOW_LINKS)

private fun entries(folder: Path): Map<String, Path> =
    Files.newDirectoryStream(folder).use { stream -> stream.map { it.fileName.toString() to it }.toMap() }

/** Call `use` with each chunk of a file seen to be regular; a symlink put in its place meanwhile is not followed. */
internal fun readChunks(path: Path, use: (ByteArray, Int) -> Unit) {
    val options = setOf<OpenOption>(StandardOpenOption.READ, LinkOption.NOFOLLOW_LINKS)
    Files.newByteChannel(path, options).use { channel: SeekableByteChannel ->
        val buffer = ByteBuffer.allocate(CHUNK)
        while (true) {
            val count = channel.read(buffer)
            if (count < 0) return
            use(buffer.array(), count)
            buffer.rewind()
        }
    }
}

internal fun hashFile(path: Path): String {
    val digest = MessageDigest.getInstance("SHA-256")
    readChunks(path) { bytes, count -> digest.update(bytes, 0, count) }
    return hex(digest.digest())
}

/** All bytes; none if there are more than any signature or document has, which is then malformed. */
private fun readSmall(path: Path): ByteArray {
    if (attributes(path).size() > SMALL) return ByteArray(0)
    val bytes = java.io.ByteArrayOutputStream()
    readChunks(path) { chunk, count -> bytes.write(chunk, 0, count) }
    return bytes.toByteArray()
}

private fun shown(file: String) = file.map { if (it in ' '..'~') it else '?' }.joinToString("")

// --- the whole -------------------------------------------------------------------------------------------------------

/** Checks one bundle folder: `content/` and `model.sig`. */
class BundleVerifier private constructor(private val folder: Path, private val asked: Question) {
    private val findings = LinkedHashSet<Finding>()
    private var digests: Map<String, String> = emptyMap()
    private var signer: String? = null
    private var document: Document? = null

    companion object {
        /**
         * The digests (file name → SHA-256) of a signature's bytes, once a pinned key has signed them: what to fetch
         * next. Throws for a signature that proves nothing.
         */
        fun openSignature(raw: ByteArray, pinnedKeys: List<String>): Map<String, String> =
            readStatement(authenticate(raw, pinnedKeys.map { Pin(it) }).second)

        /**
         * Throws IOException when a file cannot be read, IllegalArgumentException or GeneralSecurityException for a
         * pinned key that is none: that is no answer, so the bundle must not be used either.
         */
        fun verify(folder: File, question: Question): Answer {
            val verifier = BundleVerifier(folder.toPath(), question)
            verifier.run(question.pinnedKeys.map { Pin(it) })
            val sorted = verifier.findings.sortedWith(compareBy({ it.kind }, { it.file }, { it.message }))
            return Answer(sorted, verifier.signer, verifier.document)
        }
    }

    private fun found(kind: String, file: String, message: String) {
        findings.add(Finding(kind, shown(file), message))
    }

    /** True, and a finding, if the entry is a symlink or not of the wanted type. */
    private fun odd(entry: Path, file: String, folder: Boolean = false): Boolean {
        val type = attributes(entry)
        when {
            type.isSymbolicLink -> found("symlink", file, "it is a symlink; a bundle holds none")
            folder && !type.isDirectory -> found("not-a-file", file, "expected a folder")
            !folder && !type.isRegularFile -> found("not-a-file", file, "expected a regular file")
            else -> return false
        }
        return true
    }

    /** Whether the two entries of a bundle are there; whatever lies beside them is a finding. */
    private fun layout(): Boolean {
        val names = entries(folder)
        for (name in names.keys - CONTENT - SIGNATURE) found("unlisted", name, "no signature covers it")
        val signature = names[SIGNATURE]
        val content = names[CONTENT]
        if (signature == null) found("missing-signature", SIGNATURE, "nothing in this bundle is proven")
        if (content == null) found("missing", CONTENT, "the bundle has no content folder")
        val oddSignature = signature == null || odd(signature, SIGNATURE)
        val oddContent = content == null || odd(content, CONTENT, folder = true)
        return !oddSignature && !oddContent
    }

    private fun run(pinned: List<Pin>) {
        if (!layout()) return
        try {
            val (key, payload) = authenticate(readSmall(folder.resolve(SIGNATURE)), pinned)
            signer = key
            digests = readStatement(payload)
        } catch (error: Unproven) {
            return found(error.kind, SIGNATURE, error.message.orEmpty())
        } catch (error: Malformed) {
            return found("malformed-signature", SIGNATURE, error.message.orEmpty())
        } catch (error: NotJson) {
            return found("malformed-signature", SIGNATURE, error.message.orEmpty())
        }
        val named = (if (asked.kind == "tiers") listOf(TIERS) else listOf(RELEASE, REFUSAL)).filter { it in digests }
        if (named.size == 1) document = readSigned(named.first())
        else found("malformed-document", CONTENT, "expected one document, found ${named.size}: this is something else")
        checkContent()
        document?.let { judge(it, "$CONTENT/${it.name}") }
    }

    /** A document from bytes that have the signed digest. Others are reported when files are compared. */
    private fun readSigned(name: String): Document? {
        val path = folder.resolve(CONTENT).resolve(name)
        if (!Files.isRegularFile(path, LinkOption.NOFOLLOW_LINKS)) return null
        val raw = readSmall(path)
        if (sha256(raw) != digests[name]) return null
        try {
            return readDocument(raw, name)
        } catch (error: Malformed) {
            found("malformed-document", "$CONTENT/$name", error.message.orEmpty())
        } catch (error: NotJson) {
            found("malformed-document", "$CONTENT/$name", error.message.orEmpty())
        }
        return null
    }

    private fun listed(): Map<String, Entry> = document?.files.orEmpty()

    /** Other sizes than the listed ones are not worth the time that hashing takes. */
    private fun mayBeListed(size: Long) = listed().isEmpty() || listed().values.any { it.size == size }

    private fun checkContent() {
        val present = entries(folder.resolve(CONTENT))
        val missing = digests.keys.filter { it !in present }.sorted()
        val strangers = present.filterKeys { it !in digests }.toSortedMap()
        val moved = if (missing.isEmpty()) emptyMap() else hashStrangers(strangers)
        for (name in missing) {
            val digest = digests.getValue(name)
            val other = moved[digest]
            if (other == null) found("missing", "$CONTENT/$name", "expected sha256 $digest, found no such file")
            else found("renamed", "$CONTENT/$name", "it is here as ${shown(other)}, with the same sha256")
            strangers.remove(other ?: continue)
        }
        for ((name, path) in strangers) checkStranger(path, "$CONTENT/$name")
        for ((name, digest) in digests) {
            val path = present[name] ?: continue
            if (!odd(path, "$CONTENT/$name")) checkFile(path, name, digest)
        }
    }

    private fun hashStrangers(strangers: Map<String, Path>): Map<String, String> = strangers
        .filterValues { path -> attributes(path).let { it.isRegularFile && mayBeListed(it.size()) } }
        .map { (name, path) -> hashFile(path) to name }.toMap()

    private fun checkStranger(path: Path, file: String) {
        val isFolder = attributes(path).isDirectory
        if (!isFolder && odd(path, file)) return
        found("extra", file, "a ${if (isFolder) "folder" else "file"} that the signature does not cover")
    }

    private fun checkFile(path: Path, name: String, digest: String) {
        val size = attributes(path).size()
        val expected = listed()[name]?.size
        val worthHashing = size <= SMALL || (name !in FORMS && mayBeListed(size))
        val actual = if (worthHashing) hashFile(path) else null
        if (actual == digest && (expected == null || expected == size)) return
        val other = if (actual == digest) null else digests.entries.firstOrNull { it.value == actual }?.key
        val file = "$CONTENT/$name"
        when {
            other != null -> found("exchanged", file, "it holds the bytes of $other")
            expected != null && size < expected -> found("truncated", file, "expected $expected bytes, found $size")
            expected != null && size > expected -> found("extended", file, "expected $expected bytes, found $size")
            else -> found("modified", file, "expected sha256 $digest, found $actual")
        }
    }

    /** Findings about a document that is proven: whether this app wants it, and now. */
    private fun judge(document: Document, file: String) {
        judgeKey(document, file)
        judgeFreshness(document, file)
        if (asked.model != null && document.model != asked.model) {
            found("swapped", file, "expected model ${asked.model}, found ${document.model}")
        }
        if (asked.variant != null && document.variant != asked.variant) {
            found("swapped", file, "expected variant ${asked.variant}, found ${document.variant}")
        }
        if (asked.tier != null && document.name != REFUSAL && asked.tier !in document.tiers) {
            found("swapped-tier", file, "expected tier ${asked.tier}, but it is for ${document.tiers}")
        }
        judgeFiles(document, file)
        if (document.name == REFUSAL) found("refusal", file, "it was refused: ${document.reasons.joinToString("; ")}")
    }

    private fun judgeKey(document: Document, file: String) {
        val developmentKey = document.key["kind"] == "development"
        if (document.key["id"] != signer) found("disagrees", file, "it names the key ${document.key["id"]}")
        if (developmentKey && document.channel == "release") {
            found("development-key", file, "channel release was signed with a development key")
        } else if ((developmentKey || document.channel == "development") && !asked.allowDevelopment) {
            found("development-key", file, "expected a release, found a development bundle")
        }
    }

    private fun judgeFreshness(document: Document, file: String) {
        if (!asked.now.isBefore(document.expires)) found("expired", file, "it expired on ${document.expires}")
        if (asked.now.plusSeconds(CLOCK_SKEW).isBefore(document.created)) {
            found("not-yet-valid", file, "it was created on ${document.created}, after this clock's time")
        }
        if (asked.highestRelease != null && document.release < asked.highestRelease) {
            found("downgraded", file, "expected release ${asked.highestRelease} or later, found ${document.release}")
        }
        val most = document.maxAppVersion
        if (asked.appVersion != null && (asked.appVersion < document.minAppVersion || (most != null && asked.appVersion > most))) {
            found("app-version", file, "it is for app versions ${document.minAppVersion} to ${most ?: "any"}")
        }
    }

    private fun judgeFiles(document: Document, file: String) {
        val signed = digests - document.name
        for (name in document.files.keys - signed.keys) found("disagrees", file, "$name is not signed")
        for ((name, digest) in signed) {
            val entry = document.files[name]
            if (entry == null) found("disagrees", file, "it does not list $name")
            else if (entry.sha256 != digest) found("disagrees", file, "another sha256 of $name was signed")
        }
    }
}
