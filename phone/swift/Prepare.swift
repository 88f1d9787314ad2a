// Pack a bundle's slices once after the download, so that weights are mapped: pipeline/prepack/device.py, for an app.

import Foundation

private let readyFile = "prepacked/ready.json"
private let chunk: Int64 = 1 << 22

/// The disk has too little room; nothing was begun.
struct NoRoom: Error {
    let message: String
}

/// ONNX Runtime here: its version, and what tells this processor from another.
protocol PackingRuntime {
    var version: String { get }
    var processor: String { get }

    /// Open the slice so that ONNX Runtime packs it and saves `<number>.onnx` and `<number>.raw` in `folder`: docs/mapped.md.
    func saveSlice(_ graph: URL, _ number: Int, into folder: URL) throws
}

/// The graph to load; `kernels` nil: this processor is of no class, or nothing was prepared, and weights are private.
struct Prepared: Equatable {
    let graph: String
    let kernels: String?
}

private struct Packed {
    let saved: String
    let raw: Int64
    let kept: [[Int64]]
    let bytes: Int64
    let data: String

    init(_ fields: StrictJSON) throws {
        saved = try required(fields["saved"]?.text, "saved")
        raw = try required(fields["raw"]?.integer, "raw")
        kept = try required(fields["kept"]?.array, "kept").map { try required($0.array, "kept").compactMap { $0.integer } }
        bytes = try required(fields["bytes"]?.integer, "bytes")
        data = try required(fields["data"]?.text, "data")
    }
}

private struct Kernels {
    let name: String
    let graph: String
    let slices: [Packed]
}

/// Prepares one bundle's content. `free`: bytes free on its disk.
struct Prepare {
    private let content: URL
    private let folder: URL
    private let runtime: PackingRuntime
    private let free: () -> Int64
    private let graph: String
    private let slices: [String]
    private let classes: [Kernels]

    init(_ content: URL, _ runtime: PackingRuntime, free: (() -> Int64)? = nil) throws {
        (self.content, self.runtime, folder) = (content, runtime, content.appendingPathComponent("prepacked"))
        self.free = free ?? { freeBytes(content) }
        let raw = try Data(contentsOf: content.appendingPathComponent("prepack.json"))
        let work = try StrictJSON.parse([UInt8](raw))
        guard work["version"]?.integer == 1 else { throw Malformed(message: "prepack.json: this program reads version 1") }
        graph = try required(work["graph"]?.text, "graph")
        slices = try required(work["slices"]?.array, "slices").compactMap { $0.text }
        classes = try required(work["classes"]?.object, "classes").sorted { $0.key < $1.key }.map { name, fields in
            let packed = try required(fields["slices"]?.array, "slices").map { try Packed($0) }
            return Kernels(name: name, graph: try required(fields["graph"]?.text, "graph"), slices: packed)
        }
    }

    private func data(_ number: Int) -> URL { folder.appendingPathComponent("\(number).data") }

    private func ready(_ kernels: Kernels) throws -> StrictJSON {
        let bundle = try hashFile(content.appendingPathComponent("prepack.json").path)
        return .object([
            "kernels": .text(kernels.name), "bundle": .text(bundle), "onnxruntime": .text(runtime.version),
            "processor": .text(runtime.processor),
        ])
    }

    /// Pack what is not packed yet. Throws `NoRoom`.
    func run() throws -> Prepared {
        try makeFolder(folder)
        let names = slices.indices.map { "\($0).data" }
        for name in list(folder) where !names.contains(name) { remove(folder.appendingPathComponent(name)) }
        // The first slice is always packed: it tells what this processor is, and files may have come from another.
        let found = try slices.indices.map { $0 > 0 && isThere(data($0)) ? try hashFile(data($0).path) : nil }
        try requireRoom(found)
        var fitting = classes
        for number in slices.indices {
            let kept = fitting.filter { $0.slices[number].data == found[number] }
            fitting = kept.isEmpty ? try pack(number, fitting) : kept
            if fitting.isEmpty {
                remove(folder)
                return Prepared(graph: graph, kernels: nil)
            }
        }
        try write(content.appendingPathComponent(readyFile), Data(try ready(fitting[0]).json.utf8))
        return Prepared(graph: fitting[0].graph, kernels: fitting[0].name)
    }

    /// The graph to load now: the merged one if `run` came to its end and its files are there, else the bundle's own.
    func ready() throws -> Prepared {
        let raw = try? Data(contentsOf: content.appendingPathComponent(readyFile))
        let said = raw.flatMap { try? StrictJSON.parse([UInt8]($0)) }
        guard let kernels = classes.first(where: { $0.name == said?["kernels"]?.text }), let said = said,
            // Beyond the end of a mapped file is a bus error, not an exception.
            kernels.slices.indices.allSatisfy({ size(data($0)) == kernels.slices[$0].bytes }),
            said.json == (try ready(kernels)).json
        else { return Prepared(graph: graph, kernels: nil) }
        return Prepared(graph: kernels.graph, kernels: kernels.name)
    }

    /// Write a slice's data; those of the classes `fitting` that it is of.
    private func pack(_ number: Int, _ fitting: [Kernels]) throws -> [Kernels] {
        let (saved, raw) = (folder.appendingPathComponent("\(number).onnx"), folder.appendingPathComponent("\(number).raw"))
        try runtime.saveSlice(content.appendingPathComponent(slices[number]), number, into: folder)
        let digest = try hashFile(saved.path)
        let fits = fitting.filter { $0.slices[number].saved == digest && $0.slices[number].raw == size(raw) }
        remove(data(number))
        if let first = fits.first { try keep(raw, first.slices[number].kept, data(number)) }
        remove(saved)
        remove(raw)
        if fits.isEmpty { return [] }
        let made = try hashFile(data(number).path)
        return fits.filter { $0.slices[number].data == made }
    }

    /// Copy ranges (offset in raw, length, offset in data), with zeros between them.
    private func keep(_ raw: URL, _ kept: [[Int64]], _ data: URL) throws {
        let fresh = URL(fileURLWithPath: "\(data.path).new")
        try Data().write(to: fresh)
        let (source, file) = (try FileHandle(forReadingFrom: raw), try FileHandle(forWritingTo: fresh))
        defer { (try? source.close(), try? file.close()) }
        var written: Int64 = 0
        for range in kept {
            let (offset, length, target) = (range[0], range[1], range[2])
            try file.write(contentsOf: Data(count: Int(target - written)))
            try source.seek(toOffset: UInt64(offset))
            for at in stride(from: 0, to: length, by: Int64.Stride(chunk)) {
                try file.write(contentsOf: try source.read(upToCount: Int(min(chunk, length - at))) ?? Data())
            }
            written = target + length
        }
        try move(fresh, to: data)
    }

    private func requireRoom(_ found: [String?]) throws {
        let peaks = classes.map { kernels -> Int64 in
            let missing = kernels.slices.indices.filter { kernels.slices[$0].data != found[$0] }.map { kernels.slices[$0] }
            return missing.map { $0.bytes }.reduce(0, +) + (missing.map { $0.raw }.max() ?? 0)
        }
        let (needed, room) = (peaks.max() ?? 0, free())
        if room < needed { throw NoRoom(message: "\(needed) bytes are needed to prepare \(graph), \(room) are free") }
    }
}
