#!/bin/sh
# Debian's libraries for drawing without a display; the rest of scangraph needs none of them.
# Both are needed: EGL alone, without a driver behind it, ends the process that draws.
has_egl() { ldconfig -p 2>/dev/null | grep -q 'libEGL\.so\.1'; }
has_driver() { ls /usr/lib/*/dri/swrast_dri.so /usr/lib64/dri/swrast_dri.so /usr/share/glvnd/egl_vendor.d/*nvidia*.json 2>/dev/null | grep -q .; }
has_egl && has_driver && exit 0
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    echo "installing libegl1 and Mesa for the 3-D view"
    if { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends libegl1 libgl1-mesa-dri; } >/dev/null 2>&1; then
        exit 0
    fi
fi
echo "note: EGL or its driver is missing, so pictures will have no 3-D view. Debian: apt-get install libegl1 libgl1-mesa-dri"
