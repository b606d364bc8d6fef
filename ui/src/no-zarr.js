// Stands for `zarrita` in the bundle: NiiVue can read Zarr with it, and the page never does.
function none() {
  throw new Error('Zarr is not read here')
}
export const open = Object.assign(none, { v2: none, v3: none })
export const get = none
export const root = none
export const slice = none
export class FetchStore {
  constructor() {
    none()
  }
}
