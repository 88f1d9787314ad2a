// Is this bundle what its maker signed, and may this app take it now? Copy this file and StrictJSON.swift.
//
// Compiled and run over the test vectors with Swift 6.0 on Linux, where OpenSSL stands for CryptoKit; never on an Apple
// system: run the vectors there (docs/phone.md) before you rely on it. It follows kotlin/BundleVerifier.kt step by step.
//
// CryptoKit and Foundation, iOS 14 or later. The order is the defence: names, then the signature over the bytes as they
// lie, with pinned keys, then every file's SHA-256, and only then is release.json read, from bytes whose digest was
// signed. A field of release.json that this file does not know is ignored: raise min_app_version when an app must know it.

import Foundation

#if canImport(CryptoKit)
    import CryptoKit
    import Darwin
#else  // tests on Linux, which bring what is used of CryptoKit
    import Glibc
#endif

let small = 16 << 20  // bytes; no signature or document comes near it
private let chunk = 1 << 20
private let clockSkew: TimeInterval = 24 * 3600  // that two honest clocks may differ by
private let contentName = "content"
private let signatureName = "model.sig"
private let payloadType = "application/vnd.in-toto+json"

/// One thing that is wrong; `kind` and `file` are those of `python -m pipeline verify`.
public struct Finding: Hashable {
    public let kind: String
    public let file: String
    public let message: String
}

/// What the app asks. Keys are base64 DER SubjectPublicKeyInfo on P-256: pin the current and the next one.
public struct Question {
    public var pinnedKeys: [String]
    public var now = Date()
    public var highestRelease: Int64?
    public var allowDevelopment = false
    public var appVersion: Int64?
    public var tier: String?
    public var model: String?
    public var variant: String?
    /// "bundle" or "tiers"
    public var kind = "bundle"

    public init(pinnedKeys: [String]) {
        self.pinnedKeys = pinnedKeys
    }
}

/// Nothing in the folder may be used unless `ok`; then store `document.release` as the model's highest.
public struct Answer {
    public let findings: [Finding]
    public let signer: String?
    public let document: Document?
    public var ok: Bool { findings.isEmpty }
}

/// Malformed input; its message becomes a finding.
struct Malformed: Error {
    let message: String
}

/// A signature that proves nothing; `kind` says why.
private struct Unproven: Error {
    let kind: String
    let message: String
}

/// A file that cannot be read, or a pinned key that is none: no answer, so the bundle must not be used either.
public struct CannotVerify: Error {
    public let message: String
}

// MARK: - checks of parsed JSON

private typealias Check = (StrictJSON?) -> Bool

private func ascii(_ value: StrictJSON?, first: String, rest: String, upTo length: Int) -> Bool {
    guard let text = value?.text, let head = text.unicodeScalars.first, text.unicodeScalars.count <= length else { return false }
    return first.unicodeScalars.contains(head) && text.unicodeScalars.allSatisfy(rest.unicodeScalars.contains)
}

private let lower = "abcdefghijklmnopqrstuvwxyz0123456789"
private let letters = lower + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
private let isText: Check = { $0?.text != nil }
private let isObject: Check = { $0?.object != nil }
private let isName: Check = { ascii($0, first: lower, rest: lower + "_-", upTo: 40) }
private let isFileName: Check = { ascii($0, first: letters, rest: letters + "._-", upTo: 200) }
private let isSha256: Check = {
    $0?.text?.utf8.count == 64 && ascii($0, first: "0123456789abcdef", rest: "0123456789abcdef", upTo: 64)
}
private let isTime: Check = { moment($0) != nil }

private func oneOf(_ allowed: String...) -> Check {
    { value in value?.text.map(allowed.contains) ?? false }
}

private func atLeast(_ least: Int64) -> Check {
    { value in value?.integer.map { $0 >= least } ?? false }
}

private func orAbsent(_ check: @escaping Check) -> Check {
    { value in value == nil || value!.isNull || check(value) }
}

private func list(of check: @escaping Check, atLeast least: Int) -> Check {
    { value in value?.array.map { $0.count >= least && $0.allSatisfy(check) } ?? false }
}

private func list(ofExactly count: Int) -> Check {
    { value in value?.array?.count == count }
}

/// The one form of time used here, 2026-01-31T12:00:00Z.
private func moment(_ value: StrictJSON?) -> Date? {
    let formatter = ISO8601DateFormatter()
    guard let text = value?.text, let date = formatter.date(from: text), formatter.string(from: date) == text else { return nil }
    return date
}

/// An object's members, checked one by one; with `exact`, no others are allowed.
@discardableResult
private func members(
    _ value: StrictJSON?, _ checks: [String: Check], _ place: String, exact: Bool = true
) throws -> [String: StrictJSON] {
    guard let found = value?.object else { throw Malformed(message: "\(place) is not an object") }
    if exact, let unknown = found.keys.first(where: { checks[$0] == nil }) {
        throw Malformed(message: "\(place): unknown field \(unknown)")
    }
    for (key, check) in checks where !check(found[key]) {
        throw Malformed(message: "\(place): \(key) is missing or not valid")
    }
    return found
}

func hex<Bytes: Sequence>(_ bytes: Bytes) -> String where Bytes.Element == UInt8 {
    bytes.map { String(format: "%02x", $0) }.joined()
}

func sha256(_ data: Data) -> String { hex(SHA256.hash(data: data)) }

// MARK: - the signature

private struct Pin {
    let key: P256.Signing.PublicKey
    let id: String
    let hint: String

    init(_ encoded: String) throws {
        guard let der = Data(base64Encoded: encoded), let key = try? P256.Signing.PublicKey(derRepresentation: der) else {
            throw CannotVerify(message: "a pinned key is not a P-256 key")
        }
        self.key = key
        id = sha256(der)
        let lines = der.base64EncodedString(options: [.lineLength64Characters, .endLineWithLineFeed])
        hint = sha256(Data("-----BEGIN PUBLIC KEY-----\n\(lines)\n-----END PUBLIC KEY-----\n".utf8))
    }

    func signed(_ message: Data, _ signature: Data) -> Bool {
        guard let parsed = try? P256.Signing.ECDSASignature(derRepresentation: signature) else { return false }
        return key.isValidSignature(parsed, for: message)
    }
}

private struct Envelope {
    let keyid: String
    let hint: String
    let payload: Data
    let signature: Data
}

private func base64(_ value: StrictJSON?, _ what: String) throws -> Data {
    guard let text = value?.text, let data = Data(base64Encoded: text), data.base64EncodedString() == text else {
        throw Malformed(message: "its \(what) is not base64")
    }
    return data
}

private func readEnvelope(_ raw: Data) throws -> Envelope {
    let mediaType = oneOf("application/vnd.dev.sigstore.bundle.v0.3+json")
    let file = try members(
        StrictJSON.parse([UInt8](raw)),
        ["mediaType": mediaType, "verificationMaterial": isObject, "dsseEnvelope": isObject], "the file")
    let material = try members(
        file["verificationMaterial"], ["publicKey": isObject, "tlogEntries": list(ofExactly: 0)], "the material")
    let publicKey = try members(material["publicKey"], ["hint": isSha256], "the public key")
    let envelope = try members(
        file["dsseEnvelope"],
        ["payload": isText, "payloadType": oneOf(payloadType), "signatures": list(ofExactly: 1)], "the envelope")
    let proof = try members(envelope["signatures"]?.array?.first, ["sig": isText, "keyid": isText], "the signature")
    return Envelope(
        keyid: proof["keyid"]?.text ?? "", hint: publicKey["hint"]?.text ?? "",
        payload: try base64(envelope["payload"], "payload"), signature: try base64(proof["sig"], "signature"))
}

/// The pinned key that signed, and the statement's bytes, unread.
private func authenticate(_ raw: Data, _ pinned: [Pin]) throws -> (signer: String, payload: Data) {
    let envelope = try readEnvelope(raw)
    // DSSE's pre-authentication encoding: the bytes that are signed.
    let head = "DSSEv1 \(payloadType.utf8.count) \(payloadType) \(envelope.payload.count) "
    let message = Data(head.utf8) + envelope.payload
    guard let signer = pinned.first(where: { $0.signed(message, envelope.signature) }) else {
        let named = "it names the key \(envelope.keyid)"
        guard pinned.contains(where: { $0.id == envelope.keyid }) else {
            throw Unproven(kind: "other-key", message: "\(named), which is not pinned")
        }
        throw Unproven(kind: "invalid-signature", message: "\(named), but that key did not sign this statement")
    }
    guard envelope.keyid == signer.id, envelope.hint == signer.hint else {
        throw Malformed(message: "the key \(signer.id) signed it, but it names another (its label was changed)")
    }
    return (signer.id, envelope.payload)
}

/// The signed digests, file name → SHA-256, of an authenticated statement.
private func readStatement(_ payload: Data) throws -> [String: String] {
    let statement = try members(
        StrictJSON.parse([UInt8](payload)),
        [
            "_type": oneOf("https://in-toto.io/Statement/v1"), "subject": list(ofExactly: 1),
            "predicateType": oneOf("https://model_signing/signature/v1.0"), "predicate": isObject,
        ], "the signed statement")
    let subject = try members(statement["subject"]?.array?.first, ["name": isText, "digest": isObject], "the subject")
    let root = try members(subject["digest"], ["sha256": isSha256], "the subject's digest")
    let predicate = try members(
        statement["predicate"], ["serialization": isObject, "resources": list(of: isObject, atLeast: 1)], "the predicate")
    let noSymlinks: Check = { $0?.truth == false }
    try members(
        predicate["serialization"],
        ["method": oneOf("files"), "hash_type": oneOf("sha256"), "allow_symlinks": noSymlinks], "the serialization")
    var digests: [String: String] = [:]
    var folded = Set<String>()
    var all = SHA256()
    let form: [String: Check] = ["name": isFileName, "algorithm": oneOf("sha256"), "digest": isSha256]
    for resource in predicate["resources"]?.array ?? [] {
        let entry = try members(resource, form, "a resource")
        guard let name = entry["name"]?.text, let digest = entry["digest"]?.text else { continue }  // both were checked
        guard folded.insert(name.lowercased()).inserted else {
            throw Malformed(message: "two signed names are \(name), but for case")
        }
        digests[name] = digest
        all.update(data: bytes(ofHex: digest))
    }
    guard hex(all.finalize()) == root["sha256"]?.text else {
        throw Malformed(message: "the root digest is not that of the files")
    }
    return digests
}

private func bytes(ofHex text: String) -> Data {
    let digits = text.compactMap { $0.hexDigitValue }
    return Data(stride(from: 0, to: digits.count - 1, by: 2).map { UInt8(digits[$0] << 4 | digits[$0 + 1]) })
}

// MARK: - the signed document

private let formatRead: Int64 = 2
private let stamp: [String: Check] = [
    "model": isName, "release": atLeast(1), "channel": oneOf("development", "release"), "created": isTime,
    "expires": isTime, "min_app_version": atLeast(0),
    "max_app_version": { $0 != nil && ($0!.isNull || $0!.integer != nil) }, "key": isObject,
    "next_key_id": orAbsent(isSha256),
]

private func absentOr(_ kind: String) -> Check {
    { $0 == nil || $0?.text == kind }
}

private let forms: [String: [String: Check]] = [
    "release.json": [
        "kind": absentOr("release"), "variant": isName, "tiers": isObject, "files": isObject,
    ],
    "refusal.json": ["kind": absentOr("refusal"), "variant": isName, "reasons": list(of: isText, atLeast: 1)],
    "tiers.json": ["kind": absentOr("tiers"), "tiers": isObject],
]

/// A file as it was signed: bytes, and the SHA-256 of them.
public struct SignedFile {
    public let size: Int64
    public let sha256: String
}

/// What was read of release.json, refusal.json or tiers.json.
public struct Document {
    public let name: String
    public let model: String
    public let variant: String?
    public let release: Int64
    public let channel: String
    public let created: Date
    public let expires: Date
    public let minAppVersion: Int64
    public let maxAppVersion: Int64?
    public let nextKeyId: String?
    public let tiers: [String]
    fileprivate let keyId: String
    fileprivate let keyKind: String
    fileprivate let reasons: [String]
    let files: [String: SignedFile]
    /// All that was read.
    let fields: StrictJSON

    fileprivate init(_ raw: Data, name: String) throws {
        let checks = stamp.merging(forms[name] ?? [:]) { _, special in special }
        let parsed = try StrictJSON.parse([UInt8](raw))
        if let found = parsed.object, found["format"]?.integer != formatRead {
            let named = found["format"]?.integer ?? 1
            throw Malformed(message: "it is of format \(named); this verifier reads \(formatRead): fetch a release made for it")
        }
        let fields = try members(parsed, checks, "it", exact: false)
        let key = try members(fields["key"], ["id": isSha256, "kind": oneOf("development", "release")], "key")
        guard let model = fields["model"]?.text, let release = fields["release"]?.integer,
            let channel = fields["channel"]?.text, let created = moment(fields["created"]),
            let expires = moment(fields["expires"]), let least = fields["min_app_version"]?.integer
        else { throw Malformed(message: "a field is missing") }  // all were checked
        (self.name, self.model, self.release, self.channel) = (name, model, release, channel)
        (self.created, self.expires, minAppVersion) = (created, expires, least)
        maxAppVersion = fields["max_app_version"]?.integer
        variant = fields["variant"]?.text
        nextKeyId = fields["next_key_id"]?.text
        self.fields = parsed
        keyId = key["id"]?.text ?? ""
        keyKind = key["kind"]?.text ?? ""
        tiers = fields["tiers"]?.object.map { Array($0.keys) } ?? []
        reasons = fields["reasons"]?.array?.compactMap { $0.text } ?? []
        files = try Document.readFiles(fields["files"]?.object ?? [:])
        if name == "release.json" && files.isEmpty { throw Malformed(message: "it lists no files") }
    }

    private static func readFiles(_ listed: [String: StrictJSON]) throws -> [String: SignedFile] {
        var files: [String: SignedFile] = [:]
        for (file, value) in listed {
            guard isFileName(.text(file)) else { throw Malformed(message: "files: \(file) is no file name") }
            let entry = try members(value, ["size": atLeast(0), "sha256": isSha256], "files: \(file)")
            files[file] = SignedFile(size: entry["size"]?.integer ?? 0, sha256: entry["sha256"]?.text ?? "")
        }
        return files
    }
}

// MARK: - the folder

private struct Entry {
    let mode: mode_t
    let size: Int64

    /// Of the path itself: a symlink is not followed. Nil when there is nothing.
    init?(_ path: String) throws {
        var status = stat()
        guard lstat(path, &status) == 0 else {
            if errno == ENOENT { return nil }
            throw CannotVerify(message: "\(path) cannot be read: error \(errno)")
        }
        mode = status.st_mode & S_IFMT
        size = Int64(status.st_size)
    }
}

private func names(in folder: String) throws -> [String] {
    do { return try FileManager.default.contentsOfDirectory(atPath: folder) } catch {
        throw CannotVerify(message: "\(folder) cannot be read: \(error.localizedDescription)")
    }
}

/// Call `use` with each chunk of a file seen to be regular; a symlink put in its place meanwhile is not followed.
func readChunks(_ path: String, _ use: (Data) -> Void) throws {
    let descriptor = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    guard descriptor >= 0 else { throw CannotVerify(message: "\(path) cannot be read: error \(errno)") }
    defer { close(descriptor) }
    var buffer = [UInt8](repeating: 0, count: chunk)
    while true {
        let count = read(descriptor, &buffer, chunk)
        guard count >= 0 else { throw CannotVerify(message: "\(path) cannot be read: error \(errno)") }
        if count == 0 { return }
        use(Data(buffer[0..<count]))
    }
}

func hashFile(_ path: String) throws -> String {
    var hasher = SHA256()
    try readChunks(path) { hasher.update(data: $0) }
    return hex(hasher.finalize())
}

/// All bytes; none if there are more than any signature or document has, which is then malformed.
private func readSmall(_ path: String) throws -> Data {
    guard let entry = try Entry(path), entry.size <= small else { return Data() }
    var data = Data()
    try readChunks(path) { data.append($0) }
    return data
}

private func shown(_ file: String) -> String {
    String(String.UnicodeScalarView(file.unicodeScalars.map { (" "..."~").contains($0) ? $0 : "?" }))
}

// MARK: - the whole

/// Checks one bundle folder: `content/` and `model.sig`.
public struct BundleVerifier {
    private let folder: String
    private let asked: Question
    private var findings = Set<Finding>()
    private var digests: [String: String] = [:]
    private var signer: String?
    private var document: Document?

    /// The digests (file name → SHA-256) of a signature's bytes, once a pinned key has signed them: what to fetch next.
    /// Throws for a signature that proves nothing.
    static func openSignature(_ raw: Data, pinnedKeys: [String]) throws -> [String: String] {
        try readStatement(try authenticate(raw, try pinnedKeys.map { try Pin($0) }).payload)
    }

    /// Throws `CannotVerify`: that is no answer, so the bundle must not be used either.
    public static func verify(_ folder: URL, _ question: Question) throws -> Answer {
        var verifier = BundleVerifier(folder: folder.path, asked: question)
        try verifier.run(try question.pinnedKeys.map { try Pin($0) })
        let sorted = verifier.findings.sorted { ($0.kind, $0.file, $0.message) < ($1.kind, $1.file, $1.message) }
        return Answer(findings: sorted, signer: verifier.signer, document: verifier.document)
    }

    private init(folder: String, asked: Question) {
        self.folder = folder
        self.asked = asked
    }

    private mutating func found(_ kind: String, _ file: String, _ message: String) {
        findings.insert(Finding(kind: kind, file: shown(file), message: message))
    }

    private func path(_ name: String) -> String { "\(folder)/\(contentName)/\(name)" }

    /// True, and a finding, if the entry is a symlink or not of the wanted type.
    private mutating func odd(_ entry: Entry, _ file: String, wanted: mode_t = S_IFREG) -> Bool {
        if entry.mode == S_IFLNK {
            found("symlink", file, "it is a symlink; a bundle holds none")
        } else if entry.mode != wanted {
            found("not-a-file", file, "expected a \(wanted == S_IFREG ? "regular file" : "folder")")
        } else {
            return false
        }
        return true
    }

    /// Whether the two entries of a bundle are there; whatever lies beside them is a finding.
    private mutating func layout() throws -> Bool {
        for name in try names(in: folder) where name != contentName && name != signatureName {
            found("unlisted", name, "no signature covers it")
        }
        var whole = true
        if let entry = try Entry("\(folder)/\(signatureName)") {
            if odd(entry, signatureName) { whole = false }
        } else {
            found("missing-signature", signatureName, "nothing in this bundle is proven")
            whole = false
        }
        if let entry = try Entry("\(folder)/\(contentName)") {
            if odd(entry, contentName, wanted: S_IFDIR) { whole = false }
        } else {
            found("missing", contentName, "the bundle has no content folder")
            whole = false
        }
        return whole
    }

    private mutating func run(_ pinned: [Pin]) throws {
        guard try layout() else { return }
        do {
            let proven = try authenticate(try readSmall("\(folder)/\(signatureName)"), pinned)
            signer = proven.signer
            digests = try readStatement(proven.payload)
        } catch let error as Unproven {
            return found(error.kind, signatureName, error.message)
        } catch let error as Malformed {
            return found("malformed-signature", signatureName, error.message)
        } catch let error as NotJSON {
            return found("malformed-signature", signatureName, error.message)
        }
        let wanted = asked.kind == "tiers" ? ["tiers.json"] : ["release.json", "refusal.json"]
        let named = wanted.filter { digests[$0] != nil }
        if named.count == 1 {
            document = try readSigned(named[0])
        } else {
            let message = "expected one document, found \(named.count): this is something else"
            found("malformed-document", contentName, message)
        }
        try checkContent()
        if let document = document { judge(document) }
    }

    /// A document from bytes that have the signed digest. Others are reported when files are compared.
    private mutating func readSigned(_ name: String) throws -> Document? {
        guard let entry = try Entry(path(name)), entry.mode == S_IFREG else { return nil }
        let raw = try readSmall(path(name))
        guard sha256(raw) == digests[name] else { return nil }
        do {
            return try Document(raw, name: name)
        } catch let error as Malformed {
            found("malformed-document", "\(contentName)/\(name)", error.message)
        } catch let error as NotJSON {
            found("malformed-document", "\(contentName)/\(name)", error.message)
        }
        return nil
    }

    /// Other sizes than the listed ones are not worth the time that hashing takes.
    private func mayBeListed(_ size: Int64) -> Bool {
        let files = document?.files ?? [:]
        return files.isEmpty || files.values.contains { $0.size == size }
    }

    private mutating func checkContent() throws {
        let present = Set(try names(in: "\(folder)/\(contentName)"))
        let missing = digests.keys.filter { !present.contains($0) }.sorted()
        var strangers = present.filter { digests[$0] == nil }.sorted()
        let moved = missing.isEmpty ? [:] : try hashStrangers(strangers)
        for name in missing {
            if let digest = digests[name], let other = moved[digest] {
                found("renamed", "\(contentName)/\(name)", "it is here as \(shown(other)), with the same sha256")
                strangers.removeAll { $0 == other }
            } else {
                found("missing", "\(contentName)/\(name)", "found no such file")
            }
        }
        for name in strangers { try checkStranger(name) }
        for (name, digest) in digests where present.contains(name) {
            if let entry = try Entry(path(name)), !odd(entry, "\(contentName)/\(name)") {
                try checkFile(name, digest, entry.size)
            }
        }
    }

    private func hashStrangers(_ strangers: [String]) throws -> [String: String] {
        var moved: [String: String] = [:]
        for name in strangers {
            guard let entry = try Entry(path(name)), entry.mode == S_IFREG, mayBeListed(entry.size) else { continue }
            moved[try hashFile(path(name))] = name
        }
        return moved
    }

    private mutating func checkStranger(_ name: String) throws {
        let entry = try Entry(path(name))
        let isFolder = entry?.mode == S_IFDIR
        if let entry = entry, !isFolder, odd(entry, "\(contentName)/\(name)") { return }
        found("extra", "\(contentName)/\(name)", "a \(isFolder ? "folder" : "file") that the signature does not cover")
    }

    private mutating func checkFile(_ name: String, _ digest: String, _ size: Int64) throws {
        let listed = document?.files[name]?.size
        let worthHashing = size <= small || (forms[name] == nil && mayBeListed(size))
        let actual = worthHashing ? try hashFile(path(name)) : nil
        if actual == digest && (listed == nil || listed == size) { return }
        let file = "\(contentName)/\(name)"
        if let actual = actual, actual != digest, let other = digests.first(where: { $0.value == actual })?.key {
            found("exchanged", file, "it holds the bytes of \(other)")
        } else if let listed = listed, size < listed {
            found("truncated", file, "expected \(listed) bytes, found \(size)")
        } else if let listed = listed, size > listed {
            found("extended", file, "expected \(listed) bytes, found \(size)")
        } else {
            found("modified", file, "expected sha256 \(digest), found \(actual ?? "another")")
        }
    }

    /// Findings about a document that is proven: whether this app wants it, and now.
    private mutating func judge(_ document: Document) {
        let file = "\(contentName)/\(document.name)"
        judgeKey(document, file)
        judgeFreshness(document, file)
        if let model = asked.model, document.model != model {
            found("swapped", file, "expected model \(model), found \(document.model)")
        }
        if let variant = asked.variant, document.variant != variant {
            found("swapped", file, "expected variant \(variant), found \(document.variant ?? "none")")
        }
        if let tier = asked.tier, document.name != "refusal.json", !document.tiers.contains(tier) {
            found("swapped-tier", file, "expected tier \(tier), but it is for \(document.tiers)")
        }
        judgeFiles(document, file)
        if document.name == "refusal.json" {
            found("refusal", file, "it was refused: \(document.reasons.joined(separator: "; "))")
        }
    }

    private mutating func judgeKey(_ document: Document, _ file: String) {
        if document.keyId != signer { found("disagrees", file, "it names the key \(document.keyId)") }
        let developmentKey = document.keyKind == "development"
        if developmentKey && document.channel == "release" {
            found("development-key", file, "channel release was signed with a development key")
        } else if (developmentKey || document.channel == "development") && !asked.allowDevelopment {
            found("development-key", file, "expected a release, found a development bundle")
        }
    }

    private mutating func judgeFreshness(_ document: Document, _ file: String) {
        if asked.now >= document.expires { found("expired", file, "it expired on \(document.expires)") }
        if asked.now.addingTimeInterval(clockSkew) < document.created {
            found("not-yet-valid", file, "it was created on \(document.created), after this clock's time")
        }
        if let highest = asked.highestRelease, document.release < highest {
            found("downgraded", file, "expected release \(highest) or later, found \(document.release)")
        }
        if let app = asked.appVersion, app < document.minAppVersion || app > document.maxAppVersion ?? Int64.max {
            found("app-version", file, "it is for app versions from \(document.minAppVersion)")
        }
    }

    private mutating func judgeFiles(_ document: Document, _ file: String) {
        for name in document.files.keys where digests[name] == nil || name == document.name {
            found("disagrees", file, "\(name) is not signed")
        }
        for (name, digest) in digests where name != document.name {
            if let entry = document.files[name] {
                if entry.sha256 != digest { found("disagrees", file, "another sha256 of \(name) was signed") }
            } else {
                found("disagrees", file, "it does not list \(name)")
            }
        }
    }
}
