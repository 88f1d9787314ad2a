package modelbundle

// What Android knows, in the core's words. Not compiled by this project's tests: it needs the Android SDK (compileSdk 30 or
// later; getThermalHeadroom is API 30, the rest API 26) and the permission ACCESS_NETWORK_STATE.

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.net.ConnectivityManager
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import android.os.StatFs
import java.io.File

/** `maps`: whether the bundle names this processor's kernel class: `Prepared.kernels` after the first prepare. */
fun phone(context: Context, maps: Boolean = true): Phone {
    val memory = ActivityManager.MemoryInfo()
    context.getSystemService(ActivityManager::class.java).getMemoryInfo(memory)
    // availMem counts pages that the system can drop; below the threshold it begins to kill. Never advertisedMem.
    val free = memory.availMem - memory.threshold
    return Phone("android", memory.totalMem, free, free, maps)
}

/** `meteredBytes`: what the user agreed to fetch over a metered network; 0 waits for Wi-Fi. */
class AndroidNetwork(context: Context, meteredBytes: Long = 0) : Network(meteredBytes) {
    private val connectivity = context.getSystemService(ConnectivityManager::class.java)
    override fun metered() = connectivity.isActiveNetworkMetered
    override fun free(folder: File) = StatFs(folder.path).availableBytes
}

/** Readings for `Governor.observe`. Ask for the headroom at most once in ten seconds: else Android answers NaN. */
class Heat(private val context: Context) {
    private val power = context.getSystemService(PowerManager::class.java)
    private var asked = Long.MIN_VALUE
    private var headroom: Double? = null

    fun read(): Map<String, Double?> {
        val battery = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))
        val tenths = battery?.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Int.MIN_VALUE) ?: Int.MIN_VALUE
        val now = System.nanoTime() / 1_000_000_000
        if (Build.VERSION.SDK_INT >= 30 && (asked == Long.MIN_VALUE || now - asked >= 10)) {
            asked = now
            headroom = power.getThermalHeadroom(0).toDouble()
        }
        return mapOf("celsius" to if (tenths == Int.MIN_VALUE) null else tenths / 10.0, "headroom" to headroom)
    }
}

/** What the policy of the hybrid manager asks. `heat`: `Profile.name` of the governor's step. */
fun situation(context: Context, heat: String, deviceReady: Boolean): Situation {
    val connectivity = context.getSystemService(ConnectivityManager::class.java)
    val battery = context.getSystemService(BatteryManager::class.java)
    val network = when {
        connectivity.activeNetwork == null -> "none"
        connectivity.isActiveNetworkMetered -> "metered"
        else -> "unmetered"
    }
    val percent = battery.getIntProperty(BatteryManager.BATTERY_PROPERTY_CAPACITY)
    return Situation(network, if (percent in 0..100) percent / 100.0 else null, battery.isCharging, heat, deviceReady)
}
