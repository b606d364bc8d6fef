// Where a structure belongs, from its name as the label table and the models write them. What no word fits is an organ if the
// table has a code for it, and stands under "Other" if not: nothing disappears.

const WORDS = [
  ['Findings', /tumou?r|cyst|lesion|nodule|metasta|stone|calculus|calcification|thromb|hematoma|haematoma|embol|plaque/],
  ['Bones', /vertebra|rib(_|$|s)|sternum|costal|sacrum|hip(_|$)|femur|humerus|scapula|clavicul|skull|mandible|tibia|fibula|patella|radius|ulna|bone|pelvis(?=_bone)|coccyx|tooth|teeth|cartilage/],
  ['Vessels', /arter(y|ies|ial)|vein|vena|venous|aorta|vessel|trunk|carotid|jugular|atrial_appendage/],
  ['Muscles', /glute|autochthon|iliopsoas|psoas|muscle|pectoral|trapezius|sartorius|quadriceps|deltoid|oblique|rectus|thigh/],
  ['Airways and lungs', /lung|trachea|bronch|airway/],
  ['Nerves and brain', /brain|spinal_cord|nerve|ventricle/],
  ['Fat and tissue', /fat(_|$)|adipose|tissue|skin/]
]

/** Order of the groups. */
export const GROUPS = ['Findings', 'Organs', 'Vessels', 'Airways and lungs', 'Nerves and brain', 'Bones', 'Muscles', 'Fat and tissue', 'Other']

/** Return the group of a structure. */
export function groupOf(name, known) {
  const low = name.toLowerCase()
  return WORDS.find(([, pattern]) => pattern.test(low))?.[0] ?? (known ? 'Organs' : 'Other')
}
