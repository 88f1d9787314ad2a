package modelbundle

// A place of publication behind https, with what every JVM and Android have. Redirects are answers that end the fetch.

import java.io.ByteArrayInputStream
import java.net.HttpURLConnection
import java.net.URL

private const val PATIENCE = 30_000 // milliseconds to connect, and between two pieces of an answer

class HttpPlace(address: String) : Place {
    private val base = address.removeSuffix("/")

    override fun get(path: String, start: Long): Reply {
        val connection = URL("$base/$path").openConnection() as HttpURLConnection
        connection.connectTimeout = PATIENCE
        connection.readTimeout = PATIENCE
        connection.instanceFollowRedirects = false
        connection.setRequestProperty("Accept-Encoding", "identity") // else Android unpacks what it fetches
        if (start > 0) connection.setRequestProperty("Range", "bytes=$start-")
        val status = connection.responseCode
        val body = if (status < 400) connection.inputStream else ByteArrayInputStream(ByteArray(0))
        val length = connection.getHeaderField("Content-Length")?.toLongOrNull()
        val later = connection.getHeaderField("Retry-After")?.toLongOrNull() ?: 0
        return Reply(status, connection.getHeaderField("Content-Range"), length, body, later * 1000)
    }
}
