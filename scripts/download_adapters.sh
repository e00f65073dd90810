#!/usr/bin/env bash
# Fetch the adapters that the authors of ESFT published, as the script of this name in their repository does.
exec bash "$(dirname "$0")/download.sh" adapters
