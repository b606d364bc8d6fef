// NiiVue and nothing else, as its documentation shows it: what `benchmarks/page.py` compares the page with.
import { Niivue, SLICE_TYPE } from '@niivue/niivue'

const asked = new URLSearchParams(location.search)
const display = (id) => `/v1/files/${id}/display`
const slices = new Niivue({ isResizeCanvas: true })
const scene = new Niivue({ isResizeCanvas: true })
await slices.attachToCanvas(document.getElementById('slices'))
await scene.attachToCanvas(document.getElementById('scene'))
scene.setSliceType(SLICE_TYPE.RENDER)
await slices.loadVolumes([
  { url: display(asked.get('image')), name: 'image.nii.gz', cal_min: -160, cal_max: 240 },
  { url: display(asked.get('mask')), name: 'mask.nii.gz', colormap: 'random', opacity: 0.5 }
])
const { structures } = await (await fetch(display(asked.get('scene')))).json()
await scene.loadMeshes(structures.map(({ url, name, rgb }) => ({ url, name: `${name}.mz3`, rgba255: [...rgb, 255] })))
await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))
document.documentElement.dataset.ready = 'bare'
