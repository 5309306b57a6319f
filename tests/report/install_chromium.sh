#!/usr/bin/env bash
# Install the browser that tests/report/test_browser.py needs, where that is possible: as root, with apt. Ends well where
# it is not.
set -u
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/report: chromium is not installed, and not installable here; the tests that need it are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --no-install-recommends -y chromium; } >/tmp/cl_dist-apt-chromium.log 2>&1; then
    echo "tests/report: apt-get could not install chromium; the tests that need it are skipped"
    tail -n 3 /tmp/cl_dist-apt-chromium.log
fi
exit 0
