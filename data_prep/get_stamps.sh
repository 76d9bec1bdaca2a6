#!/usr/bin/env bash
# Fetch Debian's tuxpaint-stamps-default (161 MB, GPL-2 or later) and unpack it, without root: get_stamps.sh FOLDER
set -euo pipefail
out=$1
[ -e "$out" ] && exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || exit 1
mkdir -p "$(dirname "$out")"
tmp=$(mktemp -d "$(dirname "$out")/stamps.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial"
# apt's own folders need root and may be empty: a private list of packages and a private cache do not
apt=(apt-get -qq -o "Dir::State::lists=$tmp/lists" -o "Dir::Cache=$tmp/cache" -o APT::Sandbox::User=)
(cd "$tmp" && "${apt[@]}" update && "${apt[@]}" download tuxpaint-stamps-default) || exit 1
dpkg-deb -x "$tmp"/tuxpaint-stamps-default_*.deb "$tmp/unpacked"
mv "$tmp/unpacked/usr/share/tuxpaint/stamps" "$out"
