// The only room that knows NiiVue: two of its canvases, one with slices and one with surfaces, that show the same place.
// Everything that comes in and goes out is in RAS millimetres.

import { Niivue, NVImage, NVMesh, SLICE_TYPE } from '@niivue/niivue'
import { twoFrames } from './dom.js'

const PLANES = { axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL }
/** Where the camera stands: azimuth and elevation in degrees. */
export const VIEWS = { front: [180, 10], back: [0, 10], left: [90, 10], right: [270, 10], above: [180, 90], below: [180, -90] }
/** Where it stands at first: in front, a little to the patient's right and above. */
const HOME = [160, 14]
/** Lowest and highest shown value, in Hounsfield units. */
export const WINDOWS = {
  soft: { name: 'Soft', low: -160, high: 240 },
  lung: { name: 'Lung', low: -1350, high: 150 },
  bone: { name: 'Bone', low: -500, high: 1300 },
  vessel: { name: 'Vessel', low: 0, high: 600 }
}
/** A plane through the middle of the body cuts away what lies towards this side. */
export const CUTS = { left: [-1, 0, 0], right: [1, 0, 0], front: [0, 1, 0], back: [0, -1, 0], above: [0, 0, 1], below: [0, 0, -1] }

/** Phong's light on both sides of a surface, and nothing in front of the cut. `cut` is a plane: normal, distance. */
const SHADER = `#version 300 es
precision highp int;
precision highp float;
uniform float opacity;
uniform vec4 cut;
in vec4 vClr;
in vec3 vN;
in vec4 vP;
out vec4 color;
void main() {
  if (dot(vP.xyz, cut.xyz) > cut.w) discard;
  vec3 n = normalize(vN);
  if (!gl_FrontFacing) {
    color = vec4(vClr.rgb * (0.32 + 0.18 * abs(n.z)), opacity);
    return;
  }
  vec3 key = normalize(vec3(-0.35, 0.55, -0.9));
  vec3 fill = normalize(vec3(0.8, -0.1, -0.5));
  float light = 0.34 + 0.58 * max(dot(n, key), 0.0) + 0.16 * max(dot(n, fill), 0.0);
  float shine = 0.16 * pow(max(dot(reflect(key, n), vec3(0.0, 0.0, 1.0)), 0.0), 18.0);
  color = vec4(vClr.rgb * light + shine, opacity);
}`

const hex = (text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16))

/** Read MZ3 (https://github.com/neurolabusc/surf-ice/tree/master/mz3): faces, then vertices. */
export function readMz3(buffer) {
  const view = new DataView(buffer)
  if (buffer.byteLength < 16 || view.getUint16(0, true) !== 0x5a4d) throw new Error('This is no MZ3 surface.')
  const faces = view.getUint32(4, true)
  const vertices = view.getUint32(8, true)
  const start = 16 + view.getUint32(12, true)
  if (buffer.byteLength < start + 12 * (faces + vertices)) throw new Error('The surface is shorter than it says.')
  const body = start % 4 ? buffer.slice(start) : buffer
  const offset = start % 4 ? 0 : start
  return { faces: new Uint32Array(body, offset, 3 * faces), vertices: new Float32Array(body, offset + 12 * faces, 3 * vertices) }
}

/**
 * Make thin tubes of lines, since surfaces are all that the scene draws.
 *
 * @param {number[][]} points millimetres
 * @param {number[][]} segments pairs of points' numbers
 * @param {number} radius millimetres
 */
export function tubes(points, segments, radius = 0.6) {
  const sides = 5
  const vertices = new Float32Array(segments.length * sides * 6)
  const faces = new Uint32Array(segments.length * sides * 6)
  const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
  const unit = (a) => {
    const length = Math.hypot(...a) || 1
    return a.map((value) => value / length)
  }
  segments.forEach(([from, to], n) => {
    const along = unit(points[to].map((value, axis) => value - points[from][axis]))
    const aside = unit(cross(along, Math.abs(along[2]) < 0.9 ? [0, 0, 1] : [1, 0, 0]))
    const other = cross(along, aside)
    for (let side = 0; side < sides; side += 1) {
      const angle = (2 * Math.PI * side) / sides
      for (const [end, point] of [points[from], points[to]].entries()) {
        const at = (n * sides * 2 + side * 2 + end) * 3
        for (let axis = 0; axis < 3; axis += 1) vertices[at + axis] = point[axis] + radius * (Math.cos(angle) * aside[axis] + Math.sin(angle) * other[axis])
      }
      const first = n * sides * 2
      const [a, b] = [first + side * 2, first + side * 2 + 1]
      const [c, d] = [first + ((side + 1) % sides) * 2, first + ((side + 1) % sides) * 2 + 1]
      faces.set([a, c, b, b, c, d], (n * sides + side) * 6)
    }
  })
  return { faces, vertices }
}

/** Slices and surfaces of one patient. */
export class Viewer extends EventTarget {
  #slices
  #scene
  #image = null
  #overlay = null
  #lut = null
  #meshes = new Map() // key -> NVMesh
  #lines = null
  #cut = [0, 0, 0, 1]
  #redraw = false
  #shader = null
  #busy = false
  #keep = null

  /** @param {{slices: HTMLCanvasElement, scene: HTMLCanvasElement}} canvases */
  static async make(canvases) {
    const viewer = new Viewer()
    await viewer.#attach(canvases)
    return viewer
  }

  async #attach({ slices, scene }) {
    const common = {
      backColor: [0.027, 0.035, 0.05, 1],
      crosshairColor: [0.36, 0.85, 0.8, 0.9],
      isResizeCanvas: true,
      dragAndDropEnabled: false,
      logLevel: 'error',
      loadingText: '',
      isRadiologicalConvention: true,
      viewModeHotKey: '',
      clipPlaneHotKey: '',
      cycleClipPlaneHotKey: '',
      isOrientationTextVisible: true,
      fontMinPx: 14,
      fontColor: [0.85, 0.9, 0.95, 0.85]
    }
    this.#slices = new Niivue({ ...common, show3Dcrosshair: false, crosshairWidth: 1.3, crosshairWidthUnit: 'mm', crosshairGap: 4, showAllOrientationMarkers: true, multiplanarForceRender: false, multiplanarShowRender: 0, tileMargin: 4 })
    this.#scene = new Niivue({ ...common, isOrientCube: true, show3Dcrosshair: true, crosshairWidth: 0.6, crosshairWidthUnit: 'mm', sliceType: SLICE_TYPE.RENDER })
    await this.#slices.attachToCanvas(slices)
    await this.#scene.attachToCanvas(scene)
    this.#slices.setRadiologicalConvention(true)
    this.#scene.setSliceType(SLICE_TYPE.RENDER)
    this.#shader = this.#scene.setCustomMeshShader(SHADER, 'scangraph')
    this.#setCut()
    this.#showBothSides()
    this.#slices.onLocationChange = () => this.#moved(this.#slices, this.#scene)
    this.#scene.onLocationChange = () => this.#moved(this.#scene, this.#slices)
    this.layout('all')
    this.#scene.volScaleMultiplier = 1.18
    this.#scene.setRenderAzimuthElevation(...HOME)
  }

  /** NiiVue never draws the inside of a surface, which is what one sees behind a cut: there both sides are drawn. */
  #showBothSides() {
    const { gl } = this.#scene
    const enable = gl.enable.bind(gl)
    const draw = this.#scene.drawMesh3D.bind(this.#scene)
    this.#scene.drawMesh3D = (...rest) => {
      if (this.#cut[3] === 1) return draw(...rest)
      gl.enable = (what) => (what === gl.CULL_FACE ? gl.disable(what) : enable(what))
      draw(...rest)
      gl.enable = enable
      gl.enable(gl.CULL_FACE)
    }
  }

  // --- what is shown -------------------------------------------------------------------------------------------------------

  /**
   * Show an image under everything else.
   *
   * @param {ArrayBuffer} buffer NIfTI, inflated
   * @param {{low: number, high: number}} window
   */
  async setImage(buffer, window) {
    const image = await NVImage.loadFromUrl({ url: buffer, name: 'image.nii', colormap: 'gray', cal_min: window.low, cal_max: window.high, colorbarVisible: false })
    const place = this.#image && this.place()
    const first = this.#image === null
    this.#image = image
    this.#setVolumes()
    if (place) this.centre(place)
    else if (first) this.#slices.createOnLocationChange()
  }

  /**
   * Show a mask over the image; null takes it away.
   *
   * @param {ArrayBuffer|null} buffer NIfTI, inflated
   */
  async setOverlay(buffer) {
    this.#overlay = buffer && (await NVImage.loadFromUrl({ url: buffer, name: 'mask.nii', opacity: this.#opacity, colorbarVisible: false }))
    if (this.#overlay && this.#lut) this.#overlay.setColormapLabel(this.#lut)
    this.#setVolumes()
  }

  #setVolumes() {
    const volumes = [this.#image, this.#overlay].filter(Boolean)
    const slices = this.#slices
    slices.volumes = volumes
    slices.back = volumes[0] ?? null
    slices.overlays = volumes.slice(1)
    if (volumes.length) slices.updateGLVolume()
  }

  /** Whether there is anything to slice. */
  get hasVolume() {
    return this.#slices.volumes.length > 0
  }

  /** Whether there are surfaces. */
  get hasSurfaces() {
    return this.#meshes.size > 0
  }

  /**
   * Count the overlay's labels.
   *
   * @returns {Map<number, {volume_ml: number, centre_mm: number[]}>} of the display copy, so only nearly right
   */
  countLabels() {
    const found = new Map()
    const mask = this.#overlay
    if (!mask) return found
    const [, nx, ny] = mask.hdr.dims
    const voxel = Math.abs(mask.hdr.pixDims[1] * mask.hdr.pixDims[2] * mask.hdr.pixDims[3]) / 1000
    const data = mask.img
    for (let at = 0; at < data.length; at += 1) {
      const label = data[at]
      if (label === 0) continue
      let sums = found.get(label)
      if (!sums) found.set(label, (sums = [0, 0, 0, 0]))
      sums[0] += 1
      sums[1] += at % nx
      sums[2] += Math.floor(at / nx) % ny
      sums[3] += Math.floor(at / (nx * ny))
    }
    const affine = mask.hdr.affine
    for (const [label, [n, ...sums]] of found) {
      const [i, j, k] = sums.map((sum) => sum / n)
      const centre = [0, 1, 2].map((row) => affine[row][0] * i + affine[row][1] * j + affine[row][2] * k + affine[row][3])
      found.set(label, { volume_ml: n * voxel, centre_mm: centre })
    }
    return found
  }

  /**
   * Say how structures look, in slices and surfaces alike.
   *
   * @param {Array<{label: number, key: string, name: string, color: string, opacity: number, visible: boolean}>} structures
   */
  setStructures(structures) {
    const lut = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [''] }
    for (const { label, color, visible, opacity, name } of [...structures].sort((a, b) => a.label - b.label)) {
      if (lut.I.at(-1) === label) continue
      const [r, g, b] = hex(color)
      lut.R.push(r)
      lut.G.push(g)
      lut.B.push(b)
      lut.A.push(visible ? Math.round(255 * Math.max(opacity, 0.15)) : 0)
      lut.I.push(label)
      lut.labels.push(name)
    }
    this.#lut = lut
    if (this.#overlay) {
      this.#overlay.setColormapLabel(lut)
      this.#slices.updateGLVolume()
    }
    for (const { key, color, opacity, visible } of structures) this.#style(key, color, opacity, visible)
    this.#draw()
  }

  #style(key, color, opacity, visible) {
    const mesh = this.#meshes.get(key)
    if (!mesh) return
    mesh.visible = visible
    mesh.opacity = opacity
    const rgb = hex(color)
    if (rgb.some((value, n) => mesh.rgba255[n] !== value)) {
      mesh.rgba255 = new Uint8Array([...rgb, 255])
      mesh.updateMesh(this.#scene.gl)
    }
  }

  /**
   * Show surfaces; those of before go.
   *
   * @param {Array<{key: string, name: string, color: string, opacity: number, visible: boolean, buffer: ArrayBuffer}>} surfaces
   *   MZ3 in `buffer`, or a line's `points_mm` and `segments`
   */
  setSurfaces(surfaces) {
    const { gl } = this.#scene
    for (const mesh of this.#meshes.values()) mesh.unloadMesh(gl)
    this.#meshes.clear()
    for (const { key, name, color, opacity, visible, buffer, points_mm: points, segments } of surfaces) {
      const { faces, vertices } = buffer ? readMz3(buffer) : tubes(points, segments)
      if (!faces.length) continue
      const mesh = new NVMesh(vertices, faces, name, new Uint8Array([...hex(color), 255]), opacity, visible, gl)
      mesh.meshShaderIndex = this.#shader
      this.#meshes.set(key, mesh)
    }
    const place = this.#image ? this.place() : null
    this.#scene.meshes = [...this.#meshes.values()]
    this.#scene.updateGLVolume() // once for all: it measures the scene
    if (place) this.#point(this.#scene, place)
    this.#setCut()
    this.#draw()
  }

  // --- how it is shown -----------------------------------------------------------------------------------------------------

  #opacity = 0.5

  /** Show values from `low` to `high` as black to white. */
  window({ low, high }) {
    if (!this.#image) return
    this.#image.cal_min = low
    this.#image.cal_max = high
    this.#slices.updateGLVolume()
  }

  /** How strongly the overlay covers the image, 0 to 1. */
  overlayOpacity(value) {
    this.#opacity = value
    if (!this.#overlay) return
    this.#overlay.opacity = value
    this.#slices.updateGLVolume()
  }

  /** Which slices: `all` in a column, or one plane alone. */
  layout(which) {
    if (which === 'all') {
      this.#slices.setCustomLayout([
        { sliceType: SLICE_TYPE.AXIAL, position: [0, 0, 1, 0.329] },
        { sliceType: SLICE_TYPE.CORONAL, position: [0, 0.3355, 1, 0.329] },
        { sliceType: SLICE_TYPE.SAGITTAL, position: [0, 0.671, 1, 0.329] }
      ])
    } else {
      this.#slices.clearCustomLayout()
      this.#slices.setSliceType(PLANES[which])
    }
  }

  /** Whether the patient's right is on the left of the picture, as radiologists look. */
  radiological(on) {
    this.#slices.setRadiologicalConvention(on)
  }

  /** Stand at a side: one of `VIEWS`. */
  view(name) {
    this.#scene.setRenderAzimuthElevation(...VIEWS[name])
  }

  /** Turn the scene, degrees. */
  turn(azimuth, elevation) {
    const { renderAzimuth, renderElevation } = this.#scene.scene
    this.#scene.setRenderAzimuthElevation(renderAzimuth + azimuth, Math.max(-90, Math.min(90, renderElevation + elevation)))
  }

  /** Enlarge the scene by a factor. */
  zoom(factor) {
    this.#scene.volScaleMultiplier = Math.max(0.3, Math.min(6, this.#scene.volScaleMultiplier * factor))
    this.#draw()
  }

  /**
   * Cut the scene.
   *
   * @param {string|null} side one of `CUTS`, null for none
   * @param {number} depth 0 to 1: how much of it is cut away, from that side
   */
  cut(side, depth = 0.5) {
    this.#keep = side && { side, depth }
    this.#setCut()
    this.#draw()
  }

  #setCut() {
    this.#cut = [0, 0, 0, 1]
    if (this.#keep && this.#meshes.size) {
      const normal = CUTS[this.#keep.side]
      const [low, high] = this.#extent(normal)
      this.#cut = [...normal, high - (high - low) * this.#keep.depth]
    }
    const { gl, meshShaders } = this.#scene
    const { program } = meshShaders[this.#shader].shader
    gl.useProgram(program)
    gl.uniform4fv(gl.getUniformLocation(program, 'cut'), this.#cut)
  }

  /** Lowest and highest of the surfaces along a direction, millimetres. */
  #extent(normal) {
    const axis = normal.findIndex(Boolean)
    const low = Math.min(...[...this.#meshes.values()].map((mesh) => mesh.extentsMin[axis]))
    const high = Math.max(...[...this.#meshes.values()].map((mesh) => mesh.extentsMax[axis]))
    return normal[axis] > 0 ? [low, high] : [-high, -low]
  }

  #draw() {
    if (this.#redraw) return
    this.#redraw = true
    requestAnimationFrame(() => {
      this.#redraw = false
      this.#scene.drawScene()
    })
  }

  // --- where -----------------------------------------------------------------------------------------------------------------

  /** Where the cross is, RAS millimetres. */
  place() {
    return [...this.#slices.frac2mm(this.#slices.scene.crosshairPos, 0, true)].slice(0, 3)
  }

  /** Put the cross somewhere, in slices and surfaces. */
  centre(mm) {
    this.#busy = true
    if (this.hasVolume) this.#point(this.#slices, mm)
    if (this.hasSurfaces) this.#point(this.#scene, mm)
    this.#busy = false
    if (this.hasVolume) this.#slices.drawScene()
    this.#draw()
    this.#tell(mm)
  }

  /** Move the cross by slices: right, front, up. */
  step(x, y, z) {
    if (this.hasVolume) this.#slices.moveCrosshairInVox(x, y, z)
  }

  #point(instance, mm) {
    const place = instance.mm2frac([...mm, 1], 0, true)
    instance.scene.crosshairPos = [...place].map((value) => Math.max(0, Math.min(1, value)))
  }

  /** One of both was clicked: the other one follows. Neither must answer the other's answer. */
  #moved(from, to) {
    if (this.#busy) return
    const mm = [...from.frac2mm(from.scene.crosshairPos, 0, true)].slice(0, 3)
    this.#busy = true
    const shown = to === this.#slices ? this.hasVolume : this.hasSurfaces
    if (shown && (from === this.#slices ? this.hasVolume : this.hasSurfaces)) {
      this.#point(to, mm)
      if (to === this.#slices) to.drawScene()
      else this.#draw()
    }
    this.#busy = false
    this.#tell(mm)
  }

  #tell(mm) {
    const value = (volume) => {
      if (!volume) return null
      const voxel = volume.mm2vox([...mm])
      const found = volume.getValue(...voxel, 0)
      return Number.isFinite(found) ? found : null
    }
    const detail = { mm, value: value(this.#image), label: value(this.#overlay) }
    this.dispatchEvent(new CustomEvent('place', { detail }))
  }

  /** Resolves when what was asked for is on the screen. */
  async settled() {
    this.#draw()
    await twoFrames()
  }

  /** Let everything go. */
  close() {
    for (const instance of [this.#slices, this.#scene]) {
      instance.cleanup()
      instance.gl.getExtension('WEBGL_lose_context')?.loseContext()
    }
  }
}
