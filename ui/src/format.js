// Numbers and times as people read them.

/** 1.5 GB */
export function bytes(n) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let at = 0
  while (n >= 1000 && at < units.length - 1) {
    n /= 1000
    at += 1
  }
  return `${at === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[at]}`
}

/** 0.4 s, 38 s, 2 min 05 s, 1 h 20 min */
export function seconds(s) {
  if (s < 9.95) return `${s.toFixed(1)} s`
  s = Math.round(s)
  if (s < 60) return `${s} s`
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, '0')} s`
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`
}

/** about 3 min: what is only an estimate is not told to the second */
export function about(s) {
  if (s < 10) return 'a few seconds'
  if (s < 90) return `about ${Math.ceil(s / 5) * 5} s`
  if (s < 5400) return `about ${Math.round(s / 60)} min`
  return `about ${Math.round(s / 1800) / 2} h`
}

/** How long something took, or has taken until now; null where it has not begun. */
export function lasted(from, to) {
  if (!from) return null
  return Math.max(((to ? Date.parse(to) : Date.now()) - Date.parse(from)) / 1000, 0)
}

/** 14:05, or 3 Nov 14:05 on another day */
export function moment(iso) {
  const then = new Date(iso)
  const time = then.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' })
  if (then.toDateString() === new Date().toDateString()) return time
  return `${then.toLocaleDateString([], { day: 'numeric', month: 'short' })} ${time}`
}

/** 1 619, 49.7, 2.21 mL */
export function millilitres(ml) {
  if (ml === null || ml === undefined) return ''
  return `${ml >= 100 ? Math.round(ml).toLocaleString() : ml >= 10 ? ml.toFixed(1) : ml.toFixed(2)} mL`
}

/** kidney_left, inference/totalseg -> kidney left, inference totalseg */
export function words(name) {
  return String(name).replace(/[_/-]+/g, ' ').trim()
}

/** First letter upper case. */
export function capital(text) {
  return text ? text[0].toUpperCase() + text.slice(1) : text
}

/** What is measured in a name that says it at its end: error_mm -> mm. */
export function unitOf(name) {
  const units = { mm3: 'mm³', mm2: 'mm²', mm: 'mm', cm: 'cm', ml: 'mL', deg: '°', seconds: 's', mb: 'MB', percent: '%', hu: 'HU', px: 'px' }
  return units[name.split('_').pop().toLowerCase()] ?? ''
}
