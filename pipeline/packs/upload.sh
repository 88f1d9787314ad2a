#!/bin/sh
# Package and upload the asset packs of {{ model }}, release {{ release }}: on a Mac with Xcode 26 or later.
#   APPLE_ID    the app's numeric Apple ID in App Store Connect
#   API_KEY     id of an App Store Connect API key; its file is ~/.appstoreconnect/private_keys/AuthKey_$API_KEY.p8
#   API_ISSUER  the key's issuer
# Arguments: the packs to upload, default all. A pack that was uploaded is not uploaded again.
# Selectors in a manifest are relative to this folder. ba-package does not overwrite an archive.
set -eu
: "${APPLE_ID:?}" "${API_KEY:?}" "${API_ISSUER:?}"
cd "$(dirname "$0")"
mkdir -p build
[ $# -gt 0 ] || set -- {{ packs | join(" ") }}
for pack in "$@"; do
    rm -f "build/$pack.aar"
    xcrun ba-package package "{{ MANIFESTS }}/$pack.json" --output-path "build/$pack.aar"
    xcrun altool --upload-asset-pack "build/$pack.aar" --apple-id "$APPLE_ID" \
        --apiKey "$API_KEY" --apiIssuer "$API_ISSUER"
done
xcrun altool --list-asset-packs --apple-id "$APPLE_ID" --apiKey "$API_KEY" --apiIssuer "$API_ISSUER"
