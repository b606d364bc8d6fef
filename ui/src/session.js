// Who is signed in.

import { ask, get, onSignedOut, refresh } from './api.js'
import { button, el, fill } from './dom.js'

let identity = null

/** The account that is signed in, or null. */
export function me() {
  return identity
}

/** Whether the account's role reaches this one. */
export function may(role) {
  const order = ['viewer', 'operator', 'editor', 'admin']
  return identity !== null && order.indexOf(identity.role) >= order.indexOf(role)
}

/** Look who is signed in, renewing a session that can be renewed; null if nobody is. */
export async function resume() {
  let session = await get('/v1/auth/session')
  if (!session.account && session.renewable && (await refresh())) session = await get('/v1/auth/session')
  identity = session.account ? { name: session.account, role: session.role } : null
  return identity
}

/** End the session, here and at the service. */
export async function signOut() {
  await ask('/v1/auth/session', { method: 'DELETE', again: false }).catch(() => {})
  identity = null
  location.assign('/')
}

/** Show the form until somebody has signed in. */
export function signIn(place) {
  return new Promise((resolve) => {
    const name = el('input', { id: 'username', name: 'username', autocomplete: 'username', required: true, autofocus: true })
    const password = el('input', { id: 'password', name: 'password', type: 'password', autocomplete: 'current-password', required: true })
    const error = el('p.problem', { role: 'alert', hidden: true })
    const submit = button('Sign in', { type: 'submit', class: 'primary' })
    const form = el(
      'form.card.sign-in',
      { 'aria-labelledby': 'sign-in-title', novalidate: true },
      el('h1', { id: 'sign-in-title' }, 'Sign in'),
      el('p.quiet', {}, 'CT scans in, label masks and surgical 3-D scenes out.'),
      el('label', { for: 'username' }, 'Name'),
      name,
      el('label', { for: 'password' }, 'Password'),
      password,
      error,
      submit,
      el('p.quiet.small', {}, 'The first start wrote the password of “admin” into admin-password in the service’s data folder.')
    )
    form.addEventListener('submit', async (event) => {
      event.preventDefault()
      error.hidden = true
      if (!name.value || !password.value) {
        error.textContent = 'Name and password, please.'
        error.hidden = false
        ;(name.value ? password : name).focus()
        return
      }
      submit.disabled = true
      try {
        const session = await get('/v1/auth/session', { json: { username: name.value, password: password.value }, again: false })
        identity = { name: session.account, role: session.role }
        form.remove()
        resolve(identity)
      } catch (problem) {
        error.textContent = problem.status === 401 ? 'There is no such name with this password.' : problem.message
        error.hidden = false
        password.select()
      } finally {
        submit.disabled = false
      }
    })
    fill(place, form)
    name.focus()
  })
}

/** Go back to the form when the session has ended while the page was open. */
export function watchSession() {
  onSignedOut(() => {
    if (identity !== null) {
      identity = null
      document.dispatchEvent(new CustomEvent('signed-out'))
    }
  })
}
