#!/usr/bin/env bash
# The status page of a running server in a real browser, as wide as a phone and as a desk: what stands in it once it has asked
# for its numbers, and a picture of each.
#
#   deploy/page.sh HOST:PORT FOLDER        the admin port; pictures go to FOLDER/status-phone.png and FOLDER/status.png
#
# Needs chromium (Debian's package of that name). PYTHON names an interpreter with PyYAML, for check.py.
set -euo pipefail
cd "$(dirname "$0")/.."
admin="$1" folder="$2"
mkdir -p "$folder"
profile="$(mktemp -d)"
trap 'rm -rf "$profile"' EXIT
# In a container there is no sandbox for it to make, and the page is our own. Two seconds of the page's own time are enough for
# its first answer, and end before it asks again.
browser() {
    timeout 120 chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --user-data-dir="$profile" \
        --virtual-time-budget=2000 "$@" "http://$admin/" 2> "$profile/words" || { cat "$profile/words" >&2; return 1; }
}
look() {
    browser --window-size="$2" --dump-dom > "$profile/page.html"
    "${PYTHON:-python3}" deploy/check.py page "$profile/page.html" "${2%,*}"
    browser --window-size="$2" --screenshot="$profile/page.png"
    mv "$profile/page.png" "$folder/$1"
}
look status-phone.png 390,2440
look status.png 1160,1430
