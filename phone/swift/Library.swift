// What is installed, what may be, and what was the highest release: fetch, verify, install, update, remove.
//
//     ROOT/releases.json                  the highest release accepted of each subject, MODEL/VARIANT or MODEL for its tiers
//     ROOT/MODEL/VARIANT/                 the bundle in use: content/, model.sig
//     ROOT/MODEL/VARIANT.partial/         what an interrupted fetch left for the next
//
// Nothing is used before it is proven, and a bundle appears whole or not at all. Keep ROOT out of backups.

import Foundation

private let prepacked = "content/prepacked"  // made by the phone, so not part of what was signed

/// The state file is damaged, or a release is lower than one that was accepted. kind: unreadable, rollback.
struct StateError: Error {
    let kind: String
    let message: String
}

/// The highest release ever accepted of each subject. A missing file remembers nothing; a damaged one is an error.
struct Releases {
    let file: URL

    func highest(_ subject: String) throws -> Int64? { try read()[subject] }

    func record(_ subject: String, _ release: Int64) throws {
        var releases = try read()
        let known = releases[subject] ?? release
        guard release >= known else {
            let message = "release \(known) of \(subject) was accepted before, \(release) is a rollback"
            throw StateError(kind: "rollback", message: message)
        }
        if releases[subject] == release { return }
        releases[subject] = release
        let document = StrictJSON.object(["releases": .object(releases.mapValues { .integer($0) })])
        try write(file, Data(document.json.utf8))
    }

    private func read() throws -> [String: Int64] {
        guard isThere(file) else { return [:] }
        let parsed = try? StrictJSON.parse([UInt8](try Data(contentsOf: file)))
        let releases = parsed?["releases"]?.object ?? ["": .null]
        let sound = releases.allSatisfy { Releases.isSubject($0.key) && $0.value.integer != nil }
        guard parsed?.object?.count == 1, sound else {
            let message = "\(file.path) is no record of releases: without it a rollback cannot be seen"
            throw StateError(kind: "unreadable", message: message)
        }
        return releases.compactMapValues { $0.integer }
    }

    /// MODEL or MODEL/VARIANT
    private static func isSubject(_ text: String) -> Bool {
        let names = text.split(separator: "/", omittingEmptySubsequences: false)
        let allowed = "abcdefghijklmnopqrstuvwxyz0123456789_-"
        return names.count <= 2 && names.allSatisfy { !$0.isEmpty && $0.allSatisfy(allowed.contains) }
    }
}

/// What every signature is judged by.
struct Asked {
    var pinnedKeys: [String]
    var appVersion: Int64?
    var allowDevelopment = false
    var now: () -> Date = Date.init
}

/// What is installed now, and where its bytes came from.
struct Installed {
    let folder: URL
    let release: Int64
    let downloaded: Int64
    let reused: Int64
}

/// Bundles under one folder.
final class Library {
    private let root: URL
    private let asked: Asked
    private let fetcher: Fetcher
    let releases: Releases

    init(_ root: URL, _ place: Place, _ asked: Asked, _ network: NetworkPolicy = NetworkPolicy()) {
        (self.root, self.asked, fetcher) = (root, asked, Fetcher(place, network))
        releases = Releases(file: root.appendingPathComponent("releases.json"))
    }

    func folder(_ model: String, _ variant: String) -> URL { root.appendingPathComponent("\(model)/\(variant)") }

    /// The newest signed tiers.json of a model.
    func tiers(_ model: String) async throws -> Tiers {
        let folder = root.appendingPathComponent("\(model)/.tiers")
        try await layOut(folder, "tiers/\(model)/latest.sig", "tiers.json", pin: nil)
        let document = try accept(folder, model, nil, kind: "tiers")
        try releases.record(model, document.release)
        return try Tiers(document.fields)
    }

    /// Variants of a model that are here.
    func installed(_ model: String) -> [String] {
        list(root.appendingPathComponent(model)).filter {
            !$0.contains(".") && isThere(folder(model, $0).appendingPathComponent("model.sig"))
        }
    }

    /// Bring an option's bundle here, or up to date: what has not changed is copied, the rest is fetched. On any error what
    /// was installed stays.
    func install(_ model: String, _ option: Option) async throws -> Installed {
        let variant = option.variant
        let target = folder(model, variant)
        let staging = beside(target, ".partial")
        let (bundle, parts) = (staging.appendingPathComponent("bundle"), staging.appendingPathComponent("parts"))
        try recover(target)
        let path = "bundles/\(model)/\(variant)/\(option.release)/model.sig"
        try await layOut(bundle, path, "release.json", pin: option.signatureSha256)
        let document = try accept(bundle, model, variant, passing: "missing")
        let there = target.appendingPathComponent("model.sig")
        let same = isThere(there) ? try hashFile(there.path) == option.signatureSha256 : false
        if same, try findings(target, model, variant).isEmpty { return try finish(target, model, option, 0, 0) }
        let content = target.appendingPathComponent("content")
        let fetched = try await fetcher.fetch(document.files, into: parts, installed: content)
        try assemble(document.files, parts, bundle.appendingPathComponent("content"))
        _ = try accept(bundle, model, variant)
        try move(target, to: beside(target, ".old"))
        try move(bundle, to: target)
        return try finish(target, model, option, fetched.download, fetched.reused)
    }

    /// Give an installed bundle's space back. Its highest release stays in the state: an older one remains a rollback.
    func remove(_ model: String, _ variant: String) {
        for end in ["", ".old", ".partial"] { discard(beside(folder(model, variant), end)) }
    }

    private func discard(_ file: URL) { try? FileManager.default.removeItem(at: file) }
    private func beside(_ target: URL, _ end: String) -> URL { URL(fileURLWithPath: target.path + end) }

    /// Fetch a signature and, by the digest that it proves, its document, into a folder of their own.
    private func layOut(_ folder: URL, _ path: String, _ name: String, pin: String?) async throws {
        let signature = try await fetcher.small(path, limit: small)
        if let pin = pin, sha256(signature) != pin {
            throw FetchError("not-accepted", "\(path) is not the signature that tiers.json pins, \(pin)")
        }
        let digests: [String: String]
        do { digests = try BundleVerifier.openSignature(signature, pinnedKeys: asked.pinnedKeys) } catch {
            throw FetchError("not-accepted", "\(path): \(error)")
        }
        guard let digest = digests[name] else { throw FetchError("not-accepted", "\(path) signs no \(name)") }
        let raw = try await fetcher.small("blobs/sha256/\(digest)", limit: small)
        guard sha256(raw) == digest else { throw FetchError("wrong-bytes", "\(path): wrong bytes for \(name)") }
        discard(folder)
        try write(folder.appendingPathComponent("model.sig"), signature)
        try write(folder.appendingPathComponent("content/\(name)"), raw)
    }

    private func answer(_ folder: URL, _ model: String, _ variant: String?, _ kind: String) throws -> Answer {
        var question = Question(pinnedKeys: asked.pinnedKeys)
        (question.now, question.allowDevelopment, question.appVersion) = (asked.now(), asked.allowDevelopment, asked.appVersion)
        (question.model, question.variant, question.kind) = (model, variant, kind)
        question.highestRelease = try releases.highest(variant.map { "\(model)/\($0)" } ?? model)
        return try BundleVerifier.verify(folder, question)
    }

    /// What is wrong with an installed bundle; empty if nothing is.
    func findings(_ folder: URL, _ model: String, _ variant: String) throws -> [Finding] {
        try answer(folder, model, variant, "bundle").findings.filter { $0.file != prepacked }
    }

    private func accept(
        _ folder: URL, _ model: String, _ variant: String?, kind: String = "bundle", passing: String? = nil
    ) throws -> Document {
        let answer = try answer(folder, model, variant, kind)
        let wrong = answer.findings.filter { $0.kind != passing }
        if wrong.isEmpty, let document = answer.document { return document }
        let message = wrong.map { "\($0.kind): \($0.file): \($0.message)" }.joined(separator: "; ")
        throw FetchError("not-accepted", message)
    }

    /// Parts under their names; a part is copied only where two names share it.
    private func assemble(_ files: [String: SignedFile], _ parts: URL, _ content: URL) throws {
        for (sha256, entries) in Dictionary(grouping: files, by: { $0.value.sha256 }) {
            let (part, names) = (parts.appendingPathComponent(sha256), entries.map { $0.key }.sorted())
            for name in names.dropFirst() {
                try FileManager.default.copyItem(at: part, to: content.appendingPathComponent(name))
            }
            try move(part, to: content.appendingPathComponent(names[0]))
        }
    }

    /// Put back what a run moved aside that was killed between two renames.
    private func recover(_ target: URL) throws {
        let aside = beside(target, ".old")
        if !isThere(target.appendingPathComponent("model.sig")) { try move(aside, to: target) }
        discard(aside)
    }

    private func finish(_ target: URL, _ model: String, _ option: Option, _ downloaded: Int64, _ reused: Int64) throws -> Installed {
        try releases.record("\(model)/\(option.variant)", option.release)
        for end in [".old", ".partial"] { discard(beside(target, end)) }
        return Installed(folder: target, release: option.release, downloaded: downloaded, reused: reused)
    }
}
