"""The app bundle (.aab) that Gradle built with our modules: what reached it, and bundletool's opinion of it.

The modules alone are no app bundle: the Gradle plugin adds manifests and compiles the device groups, and drops the
groups in silence when a flag is missing. So this reads the archive that would be uploaded. bundletool runs on it as
`java -jar BUNDLETOOL validate --bundle=AAB`, which applies all its validators; sizes and names against Play's limits
are `android_rules`' part, for bundletool does not know them.
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

from pipeline.errors import BundleError
from pipeline.packs.android_rules import AndroidTree
from pipeline.packs.rules import Problem

GROUPS = "BUNDLE-METADATA/com.android.tools.build.bundletool/DeviceGroupConfig"
_CHUNK = 1 << 22
_PATIENCE = 3600  # seconds; bundletool reads gigabytes


def check_app_bundle(aab: Path, folder: Path) -> list[Problem]:
    """Whether every asset of the modules in `folder` is in `aab` with the same bytes (CRC-32), and the device groups.

    Raises:
        BundleError: `aab` cannot be read as an archive.
    """
    try:
        with zipfile.ZipFile(aab) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise BundleError(f"{aab} cannot be read as an app bundle: {error}.") from None
    problems = []
    if f"{GROUPS}.pb" not in entries and f"{GROUPS}.json" not in entries:
        message = f"{GROUPS}.pb is missing: the plugin dropped the device groups; check gradle.properties"
        problems.append(Problem("aab-groups", aab.name, message))
    tree = AndroidTree(folder)
    for asset in tree.assets:
        name = f"{asset.module}/assets/{asset.path}"
        if (entry := entries.get(name)) is None:
            problems.append(Problem("aab-assets", name, "it is in the modules, but not in the app bundle"))
        elif entry.file_size != asset.size or _crc(folder / asset.where) != entry.CRC:
            message = f"the app bundle has other bytes ({entry.file_size:,}) than the module ({asset.size:,})"
            problems.append(Problem("aab-assets", name, f"{message}: build it again"))
    return problems


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def run_bundletool(jar: Path, aab: Path) -> str:
    """bundletool's report on `aab`.

    Raises:
        BundleError: the jar or java is missing, or bundletool refuses the app bundle; its words are in the message.
    """
    java = shutil.which("java")
    if java is None or not jar.is_file():
        missing = f"{jar} is not there" if java else "there is no java on the PATH"
        raise BundleError(f"bundletool cannot be run: {missing}. It needs Java 11 or later and the bundletool jar.")
    command = [java, "-jar", str(jar), "validate", f"--bundle={aab}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise BundleError(f"bundletool did not answer within {_PATIENCE:,} s.") from None
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip()
        raise BundleError(f"bundletool refuses {aab} (status {done.returncode}): {words}")
    return f"bundletool validate {aab.name}: OK"
