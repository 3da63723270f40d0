#!/bin/sh
# What `make test-browser` needs: Debian's chromium and its driver. Safe to repeat. Where they cannot be installed (another
# system, no root, no network) the tests say so and are skipped.
set -u
command -v chromedriver >/dev/null && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "chromium and chromium-driver are not there, and only root on Debian can install them here" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends chromium chromium-driver; } >/dev/null ||
    echo "chromium and chromium-driver could not be installed" >&2
