"""Scenes as files: OBJ, GLB, STL, PLY, a manifest beside them, or all in a .zip.

numpy only, so that the command line and clients write what the service writes. Equal scenes give equal bytes, and a file is
written block by block: the memory that it takes does not grow with the scene.
"""

from scangraph.scenefiles.files import SceneFile, save_scene, scene_files, write_scene
from scangraph.scenefiles.manifest import SceneManifest

__all__ = ["SceneFile", "SceneManifest", "save_scene", "scene_files", "write_scene"]
