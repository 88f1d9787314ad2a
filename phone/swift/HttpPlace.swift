// A place of publication behind https, through URLSession. Redirects are answers that end the fetch.

import Foundation

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

final class HttpPlace: NSObject, Place, URLSessionDataDelegate {
    private let base: String
    private var answers: [Int: Waiting] = [:]
    private let lock = NSLock()
    private lazy var session = URLSession(configuration: .ephemeral, delegate: self, delegateQueue: nil)

    /// Who waits for a task's head, and the stream of its body.
    private struct Waiting {
        var head: CheckedContinuation<Reply, Error>?
        let body: AsyncThrowingStream<Data, Error>.Continuation
        let stream: AsyncThrowingStream<Data, Error>
    }

    init(_ address: String) {
        base = address.hasSuffix("/") ? String(address.dropLast()) : address
    }

    func get(_ path: String, from start: Int64) async throws -> Reply {
        var request = URLRequest(url: try required(URL(string: "\(base)/\(path)"), "address"))
        request.timeoutInterval = 30  // seconds between two pieces of an answer
        request.setValue("identity", forHTTPHeaderField: "Accept-Encoding")
        if start > 0 { request.setValue("bytes=\(start)-", forHTTPHeaderField: "Range") }
        let task = session.dataTask(with: request)
        let (stream, body) = AsyncThrowingStream<Data, Error>.makeStream()
        body.onTermination = { _ in task.cancel() }
        return try await withCheckedThrowingContinuation { head in
            lock.lock()
            answers[task.taskIdentifier] = Waiting(head: head, body: body, stream: stream)
            lock.unlock()
            task.resume()
        }
    }

    private func change(_ task: URLSessionTask, _ use: (inout Waiting) -> Void) {
        lock.lock()
        defer { lock.unlock() }
        if var waiting = answers[task.taskIdentifier] {
            use(&waiting)
            answers[task.taskIdentifier] = waiting
        }
    }

    func urlSession(
        _: URLSession, dataTask task: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
    ) {
        let answer = response as? HTTPURLResponse
        func header(_ name: String) -> String? { answer?.value(forHTTPHeaderField: name) }
        change(task) { waiting in
            let later = (header("Retry-After").flatMap { Int64($0) } ?? 0) * 1000
            let reply = Reply(
                status: answer?.statusCode ?? 0, range: header("Content-Range"), length: header("Content-Length").flatMap { Int64($0) },
                body: waiting.stream, retryAfter: later)
            waiting.head?.resume(returning: reply)
            waiting.head = nil
        }
        completionHandler(.allow)
    }

    func urlSession(_: URLSession, dataTask task: URLSessionDataTask, didReceive data: Data) {
        change(task) { $0.body.yield(data) }
    }

    func urlSession(_: URLSession, task: URLSessionTask, didCompleteWithError error: Error?) {
        let broken = error.map { Interrupted(message: $0.localizedDescription) }
        change(task) { waiting in
            waiting.head?.resume(throwing: broken ?? Interrupted(message: "no answer"))
            waiting.head = nil
            waiting.body.finish(throwing: broken)
        }
        lock.lock()
        answers[task.taskIdentifier] = nil
        lock.unlock()
    }

    func urlSession(
        _: URLSession, task _: URLSessionTask, willPerformHTTPRedirection _: HTTPURLResponse, newRequest _: URLRequest,
        completionHandler: @escaping (URLRequest?) -> Void
    ) {
        completionHandler(nil)
    }
}
