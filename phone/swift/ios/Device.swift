// What iOS knows, in the core's words. Not compiled by this project's tests: it needs an iOS SDK (iOS 15), and the
// entitlement com.apple.developer.kernel.increased-memory-limit for more than about 3 GB.

import Foundation
import Network
import UIKit
import os

/// `maps`: whether the bundle names this processor's kernel class: `Prepared.kernels` after the first prepare.
func phoneNow(maps: Bool = true) -> Phone {
    let ram = Int64(ProcessInfo.processInfo.physicalMemory)
    // The classes begin at marketing gigabytes, of which the system keeps some: up to the next whole one.
    let sold = (ram + 999_999_999) / 1_000_000_000 * 1_000_000_000
    // Mapped pages do not count against an app, so no limit is known for both together.
    return Phone(platform: "ios", ramBytes: sold, availableBytes: Int64(os_proc_available_memory()), residentBytes: nil, maps: maps)
}

/// Readings for `Governor.observe`: nominal is 0, critical is 3.
func heatNow() -> [String: Double] {
    ["thermal_state": Double(ProcessInfo.processInfo.thermalState.rawValue)]
}

/// Follows the network; `isExpensive` is cellular or a hotspot, `isConstrained` the user's Low Data Mode.
final class NetworkWatch {
    private let monitor = NWPathMonitor()
    private(set) var network = "none"

    init() {
        monitor.pathUpdateHandler = { [weak self] path in
            let metered = path.isExpensive || path.isConstrained
            self?.network = path.status != .satisfied ? "none" : metered ? "metered" : "unmetered"
        }
        monitor.start(queue: DispatchQueue(label: "network"))
    }

    /// For `Library`; `meteredBytes` is what the user agreed to, 0 waits for Wi-Fi.
    func policy(meteredBytes: Int64 = 0) -> NetworkPolicy {
        NetworkPolicy(meteredBytes: meteredBytes, metered: { self.network == "metered" })
    }
}

/// What the policy of the hybrid manager asks. `heat`: `Profile.name` of the governor's step.
func situationNow(network: String, heat: String, deviceReady: Bool) -> Situation {
    UIDevice.current.isBatteryMonitoringEnabled = true
    let level = UIDevice.current.batteryLevel  // -1: not known
    let charging = [.charging, .full].contains(UIDevice.current.batteryState)
    return Situation(
        network: network, battery: level < 0 ? nil : Double(level), charging: charging, heat: heat, deviceReady: deviceReady)
}
