/// Bytes that are not JSON as `StrictJSON` reads it.
struct NotJSON: Error {
    let message: String
}

/// JSON that can be read in one way only: UTF-8, no object with a key twice, nesting bounded. A number with a fraction, an
/// exponent or more than an Int64 holds is a `decimal`, which is no integer.
indirect enum StrictJSON {
    case object([String: StrictJSON])
    case array([StrictJSON])
    case text(String)
    case integer(Int64)
    case decimal(String)
    case truth(Bool)
    case null

    static func parse(_ bytes: [UInt8]) throws -> StrictJSON {
        var parser = Parser(bytes: bytes)
        let value = try parser.value(depth: 0)
        parser.space()
        guard parser.at == bytes.count else { throw parser.failure("more text after the value") }
        return value
    }

    var object: [String: StrictJSON]? { if case .object(let value) = self { return value } else { return nil } }
    var array: [StrictJSON]? { if case .array(let value) = self { return value } else { return nil } }
    var text: String? { if case .text(let value) = self { return value } else { return nil } }
    var integer: Int64? { if case .integer(let value) = self { return value } else { return nil } }
    var truth: Bool? { if case .truth(let value) = self { return value } else { return nil } }
    var double: Double? {
        switch self {
        case .integer(let value): return Double(value)
        case .decimal(let text): return Double(text)
        default: return nil
        }
    }
    var isNull: Bool { if case .null = self { return true } else { return false } }
}

extension StrictJSON {
    subscript(key: String) -> StrictJSON? { object?[key] }

    /// As JSON, keys in order.
    var json: String {
        switch self {
        case .object(let members):
            let sorted = members.sorted { $0.key < $1.key }.map { "\(StrictJSON.quoted($0.key)): \($0.value.json)" }
            return "{\(sorted.joined(separator: ", "))}"
        case .array(let items): return "[\(items.map { $0.json }.joined(separator: ", "))]"
        case .text(let text): return StrictJSON.quoted(text)
        case .integer(let value): return String(value)
        case .decimal(let text): return text
        case .truth(let value): return String(value)
        case .null: return "null"
        }
    }

    private static func quoted(_ text: String) -> String {
        let characters = text.unicodeScalars.map { scalar -> String in
            switch scalar.value {
            case 0x22, 0x5C: return "\\\(scalar)"
            case 0..<0x20:
                let digits = String(scalar.value, radix: 16)
                return "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: return String(scalar)
            }
        }
        return "\"\(characters.joined())\""
    }
}

private struct Parser {
    static let maxDepth = 64
    let bytes: [UInt8]
    var at = 0

    init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    func failure(_ what: String) -> NotJSON { NotJSON(message: "\(what) at byte \(at)") }

    var peek: UInt8? { at < bytes.count ? bytes[at] : nil }

    mutating func space() {
        while let byte = peek, byte == 0x20 || byte == 0x09 || byte == 0x0A || byte == 0x0D { at += 1 }
    }

    /// Skip space; if `token` follows, step over it.
    mutating func take(_ token: String) -> Bool {
        space()
        guard bytes[at...].starts(with: token.utf8) else { return false }
        at += token.utf8.count
        return true
    }

    mutating func expect(_ token: String) throws {
        guard take(token) else { throw failure("expected \(token)") }
    }

    mutating func value(depth: Int) throws -> StrictJSON {
        guard depth <= Parser.maxDepth else { throw failure("nested too deeply") }
        if take("{") { return .object(try members(depth: depth)) }
        if take("[") { return .array(try items(depth: depth)) }
        if take("\"") { return .text(try string()) }
        if take("true") { return .truth(true) }
        if take("false") { return .truth(false) }
        if take("null") { return .null }
        return try number()
    }

    mutating func members(depth: Int) throws -> [String: StrictJSON] {
        var found: [String: StrictJSON] = [:]
        if take("}") { return found }
        repeat {
            try expect("\"")
            let key = try string()
            guard found[key] == nil else { throw failure("the key \(key) stands twice in one object") }
            try expect(":")
            found[key] = try value(depth: depth + 1)
        } while take(",")
        try expect("}")
        return found
    }

    mutating func items(depth: Int) throws -> [StrictJSON] {
        var found: [StrictJSON] = []
        if take("]") { return found }
        repeat { found.append(try value(depth: depth + 1)) } while take(",")
        try expect("]")
        return found
    }

    mutating func next() throws -> UInt8 {
        guard let byte = peek else { throw failure("a string that does not end") }
        at += 1
        return byte
    }

    mutating func string() throws -> String {
        var units: [UInt8] = []
        while true {
            let byte = try next()
            switch byte {
            case 0x22:
                guard let text = String(validatingBytes: units) else { throw failure("not UTF-8") }
                return text
            case 0x5C: units += try escape()
            case 0..<0x20: throw failure("a control character in a string")
            default: units.append(byte)
            }
        }
    }

    /// The UTF-8 of one escape, both halves of a character beyond U+FFFF together.
    mutating func escape() throws -> [UInt8] {
        switch try next() {
        case 0x22: return [0x22]
        case 0x5C: return [0x5C]
        case 0x2F: return [0x2F]
        case 0x62: return [0x08]
        case 0x66: return [0x0C]
        case 0x6E: return [0x0A]
        case 0x72: return [0x0D]
        case 0x74: return [0x09]
        case 0x75: return try codePoint()
        default: throw failure("an unknown escape")
        }
    }

    mutating func codePoint() throws -> [UInt8] {
        var point = try fourDigits()
        if (0xD800..<0xDC00).contains(point) {
            guard try next() == 0x5C, try next() == 0x75 else { throw failure("half a character") }
            let low = try fourDigits()
            guard (0xDC00..<0xE000).contains(low) else { throw failure("half a character") }
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
        }
        guard let scalar = Unicode.Scalar(point) else { throw failure("half a character") }
        return Array(String(Character(scalar)).utf8)
    }

    mutating func fourDigits() throws -> UInt32 {
        var value: UInt32 = 0
        for _ in 0..<4 {
            guard let digit = Character(Unicode.Scalar(try next())).hexDigitValue else { throw failure("an unknown escape") }
            value = value << 4 | UInt32(digit)
        }
        return value
    }

    mutating func digits() throws {
        let start = at
        while let byte = peek, (0x30...0x39).contains(byte) { at += 1 }
        guard at > start else { throw failure("expected a value") }
    }

    mutating func number() throws -> StrictJSON {
        let start = at
        var whole = true
        if peek == 0x2D { at += 1 }
        if peek == 0x30 { at += 1 } else { try digits() }
        if peek == 0x2E {
            whole = false
            at += 1
            try digits()
        }
        if peek == 0x65 || peek == 0x45 {
            whole = false
            at += 1
            if peek == 0x2B || peek == 0x2D { at += 1 }
            try digits()
        }
        let text = String(decoding: bytes[start..<at], as: UTF8.self)
        if whole, let value = Int64(text) { return .integer(value) }
        return .decimal(text)
    }
}

private extension String {
    /// Nil unless the bytes are UTF-8 (`String(decoding:as:)` would repair them).
    init?(validatingBytes bytes: [UInt8]) {
        let text = String(decoding: bytes, as: UTF8.self)
        guard Array(text.utf8) == bytes else { return nil }
        self = text
    }
}
