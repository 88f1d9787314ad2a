package modelbundle

// A Model over onnxruntime-genai's Java API, and the packing of slices over ONNX Runtime's. Not compiled by this project's
// tests: it needs the AARs onnxruntime-genai-android and onnxruntime-android, of the versions that release.json names or
// later. Call Telemetry.off() before anything else of them.
//
// The Java class Config has no `overlay` in every version (C, Python and C# have): `runFolder` writes the overlaid
// genai_config.json into a folder of its own instead, and the signed content stays as it is.

import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession.SessionOptions
import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Tokenizer
import ai.onnxruntime.genai.TokenizerStream
import android.system.Os
import java.io.File

object Telemetry {
    /** ONNX Runtime 1.29 and later send telemetry unless this is set before the library is loaded. */
    fun off() = Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)
}

class Genai(folder: File) : Model {
    private val model = ai.onnxruntime.genai.Model(folder.path)
    private val tokenizer = Tokenizer(model)
    private var generator: Generator? = null
    private var stream: TokenizerStream? = null

    override fun start(prompt: String, settings: Settings) {
        generator?.close()
        stream?.close()
        stream = tokenizer.createStream()
        GeneratorParams(model).use { params ->
            generator = Generator(model, params)
        }
        tokenizer.encode(prompt).use { generator!!.appendTokenSequences(it) } // the bundle's chat template is the app's to apply
    }

    override fun next(): String? {
        val now = generator!!
        if (now.isDone) return null
        now.generateNextToken()
        return stream!!.decode(now.getLastTokenInSequence(0))
    }

    override fun close() = listOfNotNull(stream, generator, tokenizer, model).forEach { it.close() }
}

/** `processor`: anything that changes with it, such as Build.SOC_MODEL and the CPU features of /proc/cpuinfo. */
class Packing(override val processor: String) : PackingRuntime {
    private val environment = OrtEnvironment.getEnvironment()
    override val version: String = environment.version

    override fun saveSlice(graph: File, number: Int, folder: File) = SessionOptions().use { options ->
        options.setCPUArenaAllocator(false) // an arena keeps what it has taken
        options.setOptimizedModelFilePath(File(folder, "$number.onnx").path)
        options.addConfigEntry("session.optimized_model_external_initializers_file_name", "$number.raw")
        options.addConfigEntry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
        options.addConfigEntry("session.save_external_prepacked_constant_initializers", "1")
        environment.createSession(graph.path, options).close()
    }
}
