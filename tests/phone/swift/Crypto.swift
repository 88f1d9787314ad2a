// What phone/swift uses of CryptoKit, over OpenSSL's libcrypto: so that tests can run it on Linux. No app needs this.

import Foundation
import OpenSSL

public struct SHA256 {
    private let context: OpaquePointer

    public init() {
        context = EVP_MD_CTX_new()
        EVP_DigestInit_ex(context, EVP_sha256(), nil)
    }

    public mutating func update(data: Data) {
        _ = data.withUnsafeBytes { EVP_DigestUpdate(context, $0.baseAddress, $0.count) }
    }

    public func finalize() -> [UInt8] {
        var digest = [UInt8](repeating: 0, count: 32)
        EVP_DigestFinal_ex(context, &digest, nil)
        EVP_MD_CTX_free(context)
        return digest
    }

    public static func hash(data: Data) -> [UInt8] {
        var digest = SHA256()
        digest.update(data: data)
        return digest.finalize()
    }
}

public enum P256 {
    public enum Signing {
        public struct ECDSASignature {
            let der: Data

            public init(derRepresentation: Data) throws {
                der = derRepresentation
            }
        }

        public struct PublicKey {
            private let key: OpaquePointer

            struct NotAKey: Error {}

            public init(derRepresentation: Data) throws {
                let parsed = derRepresentation.withUnsafeBytes { raw -> OpaquePointer? in
                    var start = raw.bindMemory(to: UInt8.self).baseAddress
                    return d2i_PUBKEY(nil, &start, raw.count)
                }
                var name = [CChar](repeating: 0, count: 32)
                guard let key = parsed, EVP_PKEY_get_group_name(key, &name, name.count, nil) == 1,
                    String(cString: name) == "prime256v1"
                else { throw NotAKey() }
                self.key = key
            }

            public func isValidSignature(_ signature: ECDSASignature, for message: Data) -> Bool {
                let context = EVP_MD_CTX_new()
                defer { EVP_MD_CTX_free(context) }
                EVP_DigestVerifyInit(context, nil, EVP_sha256(), nil, key)
                return signature.der.withUnsafeBytes { proof in
                    message.withUnsafeBytes { signed in
                        let (sig, text) = (proof.bindMemory(to: UInt8.self), signed.bindMemory(to: UInt8.self))
                        return EVP_DigestVerify(context, sig.baseAddress, sig.count, text.baseAddress, text.count) == 1
                    }
                }
            }
        }
    }
}
