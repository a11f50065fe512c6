#!/bin/sh
# Rebuilds streamlens/views/vega/: the offline bundle, the licences of all that is in it, and the
# table of versions. Needs Node 20 and an npm registry. Same lock file, same bytes.
set -eu
cd "$(dirname "$0")"
npm ci --no-audit --no-fund
node bundle.mjs ../../streamlens/views/vega
