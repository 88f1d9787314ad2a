// The files of a bundle, over connections that break, onto a disk that may be too small, without surprise on the bill.
//
// A file is asked for by the SHA-256 of its bytes, so what an interrupted run left can always be gone on with: whatever
// the server meanwhile did, the digest decides.

import Foundation

#if canImport(CryptoKit)
    import CryptoKit
#endif

private let attempts = 8  // requests in a row that bring nothing new end a fetch
private let longestPause: Int64 = 60_000  // milliseconds
private let passing: Set<Int> = [408, 425, 429, 500, 502, 503, 504]

/// A transfer that broke and may be tried again; `retryAfter` in milliseconds.
struct Interrupted: Error {
    let message: String
    var retryAfter: Int64 = 0
}

/// Why nothing was fetched. kind: disk, metered, missing, interrupted, wrong-size, wrong-bytes, refused, not-accepted.
struct FetchError: Error {
    let kind: String
    let message: String

    init(_ kind: String, _ message: String) {
        (self.kind, self.message) = (kind, message)
    }
}

/// An answer; `range` and `length` are its headers Content-Range and Content-Length. Its body throws `Interrupted`.
struct Reply {
    let status: Int
    let range: String?
    let length: Int64?
    let body: AsyncThrowingStream<Data, Error>
    var retryAfter: Int64 = 0
}

/// Where bundles are published; adapters implement it over HTTP. Throws `Interrupted` where it did not answer.
protocol Place {
    func get(_ path: String, from start: Int64) async throws -> Reply
}

/// What the system says of the network and the disk. `meteredBytes` may be fetched over a network that costs money.
struct NetworkPolicy {
    var meteredBytes: Int64 = 0
    var metered: () -> Bool = { false }
    var free: (URL) -> Int64 = freeBytes
    var pause: (Int64) async throws -> Void = { try await Task.sleep(nanoseconds: UInt64($0) * 1_000_000) }
    var progress: (Int) -> Void = { _ in }
}

func freeBytes(_ folder: URL) -> Int64 {
    let found = try? FileManager.default.attributesOfFileSystem(forPath: folder.path)[.systemFreeSize]
    return (found as? NSNumber)?.int64Value ?? 0
}

/// What bringing files here takes: bytes to download, bytes that are here; `copies`: digest → an installed file.
struct FetchPlan {
    let download: Int64
    let reused: Int64
    let copies: [String: URL]
}

// MARK: - files

func isThere(_ file: URL) -> Bool { FileManager.default.fileExists(atPath: file.path) }
func remove(_ file: URL) { try? FileManager.default.removeItem(at: file) }

func list(_ folder: URL) -> [String] {
    ((try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []).sorted()
}

/// Bytes of a regular file; nil if there is none.
func size(_ file: URL) -> Int64? {
    guard let found = try? FileManager.default.attributesOfItem(atPath: file.path) else { return nil }
    return found[.type] as? FileAttributeType == .typeRegular ? (found[.size] as? NSNumber)?.int64Value : nil
}

func makeFolder(_ folder: URL) throws {
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
}

private func sync(_ path: URL) throws {
    let descriptor = open(path.path, O_RDONLY)
    guard descriptor >= 0 else { throw CannotVerify(message: "\(path.path) cannot be opened: error \(errno)") }
    defer { close(descriptor) }
    guard fsync(descriptor) == 0 else { throw CannotVerify(message: "\(path.path) cannot be written: error \(errno)") }
}

/// Rename; on the disk before the new name is. What had that name before is replaced, if it is a file.
func move(_ from: URL, to: URL) throws {
    guard isThere(from) else { return }
    try sync(from)
    guard rename(from.path, to.path) == 0 else { throw CannotVerify(message: "\(to.path) cannot be made: error \(errno)") }
    try sync(to.deletingLastPathComponent())
}

/// Write a file that appears whole.
func write(_ file: URL, _ data: Data) throws {
    try makeFolder(file.deletingLastPathComponent())
    let fresh = URL(fileURLWithPath: "\(file.path).new")
    try data.write(to: fresh)
    try move(fresh, to: file)
}

// MARK: - fetching

/// The first byte of a reply to a request from `start` on. `size`: what was signed, nil where nobody knows.
private func begun(_ reply: Reply, _ path: String, _ start: Int64, _ size: Int64?) throws -> Int64 {
    let status = reply.status
    if passing.contains(status) { throw Interrupted(message: "HTTP \(status)", retryAfter: reply.retryAfter) }
    if status == 404 || status == 410 { throw FetchError("missing", "\(path) is not there (HTTP \(status))") }
    if status == 416 { throw FetchError("wrong-size", "\(path) ends before byte \(start)") }
    guard status == 200 || status == 206 else { throw FetchError("refused", "\(path): HTTP \(status)") }
    let (begin, total) = status == 200 ? (0, reply.length) : try told(reply.range, path, start)
    if let size = size, let total = total, total != size {
        throw FetchError("wrong-size", "\(path) has \(total) bytes there, \(size) were signed")
    }
    return begin
}

/// Of `bytes 300-999/1000` the first number, which has to be `start`, and the last, nil for `*`.
private func told(_ range: String?, _ path: String, _ start: Int64) throws -> (Int64, Int64?) {
    let parts = (range ?? "").split(whereSeparator: { " -/".contains($0) }).map(String.init)
    guard parts.count == 4, parts[0] == "bytes", Int64(parts[1]) == start, parts[3] == "*" || Int64(parts[3]) != nil else {
        throw FetchError("refused", "\(path): asked for byte \(start) on, got \(range ?? "no range")")
    }
    return (start, Int64(parts[3]))
}

final class Fetcher {
    private let place: Place
    private let network: NetworkPolicy
    private var left: Int64 = 0

    init(_ place: Place, _ network: NetworkPolicy = NetworkPolicy()) {
        (self.place, self.network) = (place, network)
    }

    /// Give `use` the bytes of `path` from `start` to `size` (nil: to its end), over as many requests as it takes.
    private func stream(
        _ path: String, from start: Int64, to size: Int64?, allow: () throws -> Void = {}, use: (Data) throws -> Void
    ) async throws {
        var position = start
        var failures = 0
        while size == nil || position < size! {
            let reached = position
            try allow()
            do {
                let reply = try await place.get(path, from: position)
                var skip = position - (try begun(reply, path, position, size))
                for try await chunk in reply.body {
                    let skipped = min(skip, Int64(chunk.count))  // a server without Range begins at the first byte again
                    skip -= skipped
                    let most = size.map { $0 - position } ?? Int64.max
                    let wanted = chunk.dropFirst(Int(skipped)).prefix(Int(clamping: most))
                    if wanted.isEmpty { continue }
                    try use(Data(wanted))
                    position += Int64(wanted.count)
                    if position == size { return }
                }
                if size == nil { return }
                throw Interrupted(message: "the answer ended early")
            } catch let error as Interrupted {
                failures = position > reached ? 1 : failures + 1
                if failures >= attempts {
                    let what = "\(failures) requests brought nothing beyond byte \(position): \(error.message)"
                    throw FetchError("interrupted", "\(path): \(what)")
                }
                let growing: Int64 = failures > 1 ? 500 << Int64(failures - 2) : 0
                try await network.pause(min(longestPause, max(error.retryAfter, growing)))
            }
        }
    }

    /// A small file of unknown size, at most `limit` bytes.
    func small(_ path: String, limit: Int) async throws -> Data {
        var data = Data()
        try await stream(path, from: 0, to: nil) { chunk in
            data.append(chunk)
            if data.count > limit { throw FetchError("wrong-size", "\(path) has more than \(limit) bytes") }
        }
        return data
    }

    /// What bringing the files `wanted` into the folder `parts` takes, and what of `installed` can be reused.
    func plan(_ wanted: [String: SignedFile], into parts: URL, installed: URL? = nil) throws -> FetchPlan {
        let sizes = Dictionary(wanted.values.map { ($0.sha256, $0.size) }, uniquingKeysWith: { first, _ in first })
        var copies: [String: URL] = [:]
        for name in installed.map(list) ?? [] {
            let file = installed!.appendingPathComponent(name)
            guard let there = size(file), sizes.values.contains(there) else { continue }
            let sha256 = try hashFile(file.path)
            if sizes[sha256] != nil, !isThere(parts.appendingPathComponent(sha256)) { copies[sha256] = file }
        }
        let fresh = sizes.filter { copies[$0.key] == nil }
        let download = fresh.map { $0.value - kept(parts, $0.key, $0.value) }.reduce(0, +)
        return FetchPlan(download: download, reused: sizes.values.reduce(0, +) - download, copies: copies)
    }

    /// Bytes of a file that an earlier run left.
    private func kept(_ parts: URL, _ sha256: String, _ size: Int64) -> Int64 {
        if isThere(parts.appendingPathComponent(sha256)) { return size }
        let there = sizeOrNone(parts.appendingPathComponent("\(sha256).partial"))
        return there > size ? 0 : there
    }

    private func sizeOrNone(_ file: URL) -> Int64 { size(file) ?? 0 }

    /// Bring all files to `parts`, each under its SHA-256. Disk and network are asked before the first byte moves.
    @discardableResult
    func fetch(_ wanted: [String: SignedFile], into parts: URL, installed: URL? = nil) async throws -> FetchPlan {
        try makeFolder(parts)
        let digests = Set(wanted.values.map { $0.sha256 })
        for name in list(parts) where !digests.contains(name.replacingOccurrences(of: ".partial", with: "")) {
            remove(parts.appendingPathComponent(name))  // of a release that has been superseded
        }
        let planned = try plan(wanted, into: parts, installed: installed)
        let needed = planned.download + planned.copies.values.map { sizeOrNone($0) }.reduce(0, +)
        let free = network.free(parts)
        guard free >= needed else {
            throw FetchError("disk", "\(needed) bytes are needed, \(free) are free: free \(needed - free) more")
        }
        left = planned.download
        try allow()
        for (sha256, file) in planned.copies {
            try FileManager.default.copyItem(at: file, to: parts.appendingPathComponent(sha256))
        }
        for (name, file) in wanted.sorted(by: { $0.key < $1.key }) { try await part(name, file, parts) }
        return planned
    }

    /// Refuse to go on where the network costs money and the user did not agree to so much.
    private func allow() throws {
        if left > network.meteredBytes && network.metered() {
            let allowed = "\(network.meteredBytes) are allowed over a metered network"
            throw FetchError("metered", "\(left) bytes are left, \(allowed)")
        }
    }

    private func part(_ name: String, _ file: SignedFile, _ parts: URL) async throws {
        let whole = parts.appendingPathComponent(file.sha256)
        let partial = parts.appendingPathComponent("\(file.sha256).partial")
        if isThere(whole) { return }
        let resumed = kept(parts, file.sha256, file.size)
        if resumed == 0 { remove(partial) }
        var actual = try await append(partial, file)
        if actual != file.sha256 && resumed > 0 {
            remove(partial)  // what an earlier run left was wrong: once more from the first byte
            left += file.size
            actual = try await append(partial, file)
        }
        guard actual == file.sha256 else {
            remove(partial)
            throw FetchError("wrong-bytes", "\(name): expected sha256 \(file.sha256), got \(actual); none of it was kept")
        }
        try move(partial, to: whole)
    }

    /// Complete the file `partial`; the SHA-256 of all its bytes.
    private func append(_ partial: URL, _ file: SignedFile) async throws -> String {
        var digest = SHA256()
        if isThere(partial) {
            try readChunks(partial.path) { digest.update(data: $0) }
        } else {
            try Data().write(to: partial)
        }
        let handle = try FileHandle(forWritingTo: partial)
        defer { try? handle.close() }
        let start = Int64(try handle.seekToEnd())
        do {
            try await stream("blobs/sha256/\(file.sha256)", from: start, to: file.size, allow: allow) { chunk in
                try handle.write(contentsOf: chunk)
                digest.update(data: chunk)
                left -= Int64(chunk.count)
                network.progress(chunk.count)
            }
        } catch let error as FetchError {
            if error.kind == "wrong-size" { remove(partial) }
            throw error
        }
        return hex(digest.finalize())
    }
}
