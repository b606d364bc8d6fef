#!/bin/sh
# Debian's libraries that Python packages expect from the system. `system.sh` looks after drawing without a display, of which both
# parts are needed: EGL alone, without a driver behind it, ends the process that draws. `system.sh open3d` looks after that extra,
# `system.sh chromium` after the browser of the page's tests.
# The rest of scangraph needs none of them.
has_library() { ldconfig -p 2>/dev/null | grep -qF "$1"; }
has_driver() { ls /usr/lib/*/dri/swrast_dri.so /usr/lib64/dri/swrast_dri.so /usr/share/glvnd/egl_vendor.d/*nvidia*.json 2>/dev/null | grep -q .; }

case "${1:-drawing}" in
drawing)
    has_library libEGL.so.1 && has_driver && exit 0
    packages="libegl1 libgl1-mesa-dri" purpose="the 3-D view" without="EGL or its driver is missing, so pictures will have no 3-D view"
    ;;
open3d)
    all=yes # what libOpen3D.so is linked with, beside the C libraries
    for library in libusb-1.0.so.0 libEGL.so.1 libGL.so.1 libX11.so.6 libudev.so.1 libidn2.so.0; do
        has_library "$library" || all=no
    done
    [ $all = yes ] && exit 0
    packages="libusb-1.0-0 libegl1 libgl1 libx11-6 libudev1 libidn2-0" purpose="open3d" without="a library of open3d's is missing, it cannot be imported"
    ;;
chromium)
    command -v chromium >/dev/null 2>&1 && exit 0
    packages="chromium" purpose="the tests of the web page" without="Chromium is missing, the tests of the web page are skipped"
    ;;
*)
    echo "usage: system.sh [drawing|open3d|chromium]" >&2
    exit 2
    ;;
esac
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    echo "installing $packages for $purpose"
    # shellcheck disable=SC2086 - a list of words
    if { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages; } >/dev/null 2>&1; then
        exit 0
    fi
fi
echo "note: $without. Debian: apt-get install $packages"
