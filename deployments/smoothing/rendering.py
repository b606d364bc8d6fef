"""A scene drawn off screen, in a process of its own.

Where OpenGL is missing or broken VTK does not raise: it ends the process (9.7 without Mesa's drivers: signal 11). So the drawing
is done by a child, this file run as a script, and its death is an answer. Its memory is gone with it, too. The file imports
nothing of ours, so the child starts as quickly as VTK itself.

Glass: structures that others should be seen through are opaque where they are seen edge-on and clear where one looks straight
at them, as in medical illustration; without that, ten translucent organs make one brown cloud.
"""

from __future__ import annotations

_TIMEOUT_S = 180
_PACKAGES = "Debian: libegl1 libgl1-mesa-dri"
#: Where the camera stands as seen from the scene's middle, LPS: in front, a little to the patient's left and above.
_CAMERA = (0.36, -1.0, 0.2)
_VIEW_ANGLE = 24.0
