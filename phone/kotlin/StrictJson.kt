package modelbundle

import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException

/** Bytes that are not JSON as StrictJson reads it. */
class NotJson(message: String) : Exception(message)

/** A number with a fraction, an exponent or more than a Long holds: no integer of ours. */
class Decimal(val text: String)

/** A parsed number, whichever it is. Throws NotJson for anything else. */
fun double(value: Any?): Double = when (value) {
    is Decimal -> value.text.toDouble()
    is Number -> value.toDouble()
    else -> throw NotJson("expected a number")
}

/** Maps, lists, strings, numbers, booleans and null as JSON. */
fun toJson(value: Any?): String = when (value) {
    is Map<*, *> -> value.entries.joinToString(", ", "{", "}") { "${quoted(it.key as String)}: ${toJson(it.value)}" }
    is List<*> -> value.joinToString(", ", "[", "]") { toJson(it) }
    is String -> quoted(value)
    is Decimal -> value.text
    is Double -> if (value.isFinite()) value.toString() else "null"
    else -> value.toString()
}

private fun quoted(text: String) = text.map {
    when {
        it == '"' || it == '\\' -> "\\$it"
        it < ' ' -> "\\u%04x".format(it.code)
        else -> it.toString()
    }
}.joinToString("", "\"", "\"")

/**
 * JSON that can be read in one way only: UTF-8, no object with a key twice, nesting bounded. Objects become Maps, arrays
 * Lists, integers Longs. (org.json takes the last of two values, and is not there on a plain JVM.)
 */
class StrictJson private constructor(private val text: String) {
    private var at = 0

    companion object {
        private const val MAX_DEPTH = 64
        private val NUMBER = Regex("-?(?:0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")

        /** Throws NotJson. */
        fun parse(bytes: ByteArray): Any? {
            val text = try {
                Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString()
            } catch (error: CharacterCodingException) {
                throw NotJson("it is not UTF-8")
            }
            val parser = StrictJson(text)
            val value = parser.value(0)
            parser.space()
            if (parser.at != text.length) parser.fail("more text after the value")
            return value
        }
    }

    private fun fail(what: String): Nothing = throw NotJson("$what at character $at")

    private fun space() {
        while (at < text.length && text[at] in " \t\n\r") at++
    }

    /** Skip space; if `token` follows, step over it. */
    private fun take(token: String): Boolean {
        space()
        if (!text.startsWith(token, at)) return false
        at += token.length
        return true
    }

    private fun expect(token: String) {
        if (!take(token)) fail("expected $token")
    }

    private fun value(depth: Int): Any? {
        if (depth > MAX_DEPTH) fail("nested too deeply")
        return when {
            take("{") -> members(depth)
            take("[") -> items(depth)
            take("\"") -> string()
            take("true") -> true
            take("false") -> false
            take("null") -> null
            else -> number()
        }
    }

    private fun members(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        if (take("}")) return found
        do {
            expect("\"")
            val key = string()
            if (found.containsKey(key)) fail("the key $key stands twice in one object")
            expect(":")
            found[key] = value(depth + 1)
        } while (take(","))
        expect("}")
        return found
    }

    private fun items(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        if (take("]")) return found
        do found.add(value(depth + 1)) while (take(","))
        expect("]")
        return found
    }

    private fun next(): Char {
        if (at >= text.length) fail("a string that does not end")
        return text[at++]
    }

    private fun string(): String {
        val found = StringBuilder()
        while (true) {
            val char = next()
            when {
                char == '"' -> return wellFormed(found.toString())
                char == '\\' -> found.append(escape())
                char < ' ' -> fail("a control character in a string")
                else -> found.append(char)
            }
        }
    }

    private fun escape(): Char = when (next()) {
        '"' -> '"'
        '\\' -> '\\'
        '/' -> '/'
        'b' -> '\b'
        'f' -> '\u000c'
        'n' -> '\n'
        'r' -> '\r'
        't' -> '\t'
        'u' -> String(CharArray(4) { hexadecimal(next()) }).toInt(16).toChar()
        else -> fail("an unknown escape")
    }

    private fun hexadecimal(char: Char): Char {
        if (char in '0'..'9' || char in 'a'..'f' || char in 'A'..'F') return char
        fail("an unknown escape")
    }

    private fun wellFormed(found: String): String {
        var index = 0
        while (index < found.length) {
            val pair = found[index].isHighSurrogate() && index + 1 < found.length && found[index + 1].isLowSurrogate()
            if (found[index].isSurrogate() && !pair) fail("half a character")
            index += if (pair) 2 else 1
        }
        return found
    }

    private fun number(): Any {
        val match = NUMBER.find(text, at)
        if (match == null || match.range.first != at) fail("expected a value")
        at = match.range.last + 1
        val whole = match.groups[1] == null && match.groups[2] == null
        return (if (whole) match.value.toLongOrNull() else null) ?: Decimal(match.value)
    }
}
