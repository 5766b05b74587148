"""Words and sentence templates of the generated product reviews; see `reviews`.

A `{slot}` of a template is filled from `SLOTS` or from the product's `Category`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Category:
  """The words of one category of products. Every phrase belongs to one category only."""

  products: tuple[str, ...]
  features: tuple[str, ...]
  praise: tuple[str, ...]  # verb phrases in the third person
  complaint: tuple[str, ...]  # verb phrases in the third person


CATEGORIES = (
  Category(
    products=('kettle', 'toaster', 'blender', 'oven'),
    features=('lid', 'tray', 'timer', 'heating', 'dial', 'plug'),
    praise=('heats fast', 'cooks evenly', 'wipes clean', 'warms up quickly', 'saves power'),
    complaint=(
      'burns everything',
      'leaks water',
      'smells of smoke',
      'heats slowly',
      'trips the fuse',
    ),
  ),
  Category(
    products=('speaker', 'radio', 'headset', 'microphone'),
    features=('sound', 'bass', 'volume', 'signal', 'treble', 'antenna'),
    praise=('sounds clear', 'plays loud', 'pairs at once', 'fills the room', 'sounds rich'),
    complaint=(
      'crackles often',
      'hums loudly',
      'goes silent',
      'sounds thin',
      'loses the station',
    ),
  ),
  Category(
    products=('chair', 'sofa', 'desk', 'bench'),
    features=('seat', 'cushion', 'frame', 'wood', 'backrest', 'armrest'),
    praise=(
      'supports my back',
      'stands firm',
      'fits the corner',
      'feels soft',
      'holds my weight',
    ),
    complaint=(
      'wobbles badly',
      'creaks at night',
      'sags already',
      'hurts my back',
      'scratches the floor',
    ),
  ),
  Category(
    products=('jacket', 'sweater', 'scarf', 'coat'),
    features=('fabric', 'collar', 'sleeve', 'zip', 'lining', 'pocket'),
    praise=('keeps me warm', 'fits like a glove', 'washes well', 'suits me', 'breathes well'),
    complaint=(
      'itches badly',
      'shrinks in the wash',
      'tears easily',
      'fades fast',
      'hangs loose',
    ),
  ),
  Category(
    products=('mower', 'rake', 'spade', 'trimmer'),
    features=('blade', 'engine', 'wheel', 'grip', 'shaft', 'guard'),
    praise=('cuts clean', 'digs deep', 'starts at once', 'rolls smoothly', 'clears the lawn'),
    complaint=(
      'stalls often',
      'rusts quickly',
      'jams often',
      'slips in the rain',
      'ruins the grass',
    ),
  ),
  Category(
    products=('tent', 'lantern', 'backpack', 'hammock'),
    features=('pole', 'strap', 'canvas', 'buckle', 'hook', 'peg'),
    praise=('packs small', 'stays dry', 'lasts all night', 'carries well', 'goes up in minutes'),
    complaint=('lets in rain', 'blows over', 'rips at once', 'smells of damp', 'falls down'),
  ),
)

GOOD = ('good', 'nice', 'neat', 'solid', 'handy', 'smart')
GREAT = ('great', 'lovely', 'superb', 'perfect', 'excellent', 'wonderful')
BAD = ('bad', 'poor', 'weak', 'cheap', 'ugly', 'dull')
AWFUL = ('awful', 'terrible', 'horrible', 'useless', 'dreadful', 'hopeless')
LIKES = ('like', 'enjoy')
LOVES = ('love', 'adore')
DISLIKES = ('dislike', 'mistrust')
HATES = ('hate', 'regret')
RECOMMENDS = ('recommend it', 'buy it again', 'keep it for years')
WARNS = ('want my money back', 'send it back', 'throw it away')
# Strength of the opinions that all categories share; praise has 1.0 and complaints -1.0.
OPINIONS = {
  GOOD + LIKES: 0.7,
  BAD + DISLIKES: -0.7,
  GREAT + LOVES + RECOMMENDS: 1.0,
  AWFUL + HATES + WARNS: -1.0,
}
STRONGER = ('very', 'really', 'truly')
WEAKER = ('quite', 'rather', 'fairly')
NEGATIONS = ('not', 'never')

# Fillers that all categories share; "" means that the slot may stay empty.
SLOTS = {
  'opener': ('', '', 'overall', 'so far'),
  'is': ('is', 'looks', 'feels', 'seems'),
  'degree': ('', '', *STRONGER, *WEAKER),
  'fine': GOOD + GREAT,
  'foul': BAD + AWFUL,
  'good': GOOD,
  'bad': BAD,
  'love': LIKES + LOVES,
  'hate': DISLIKES + HATES,
  'recommend': RECOMMENDS,
  'warn': WARNS,
  'plain': ('black', 'grey', 'white', 'small', 'large', 'average', 'standard', 'normal'),
  'person': ('sister', 'brother', 'friend', 'neighbour'),
  'when': ('last week', 'in may', 'on sale', 'online', 'two months ago'),
  'where': ('every day', 'at home', 'at weekends', 'with my friend'),
  'extra': ('in a box', 'with a manual', 'in two parts', 'on time'),
}

POSITIVE = (
  '{opener} the {feature} {is} {degree} {fine}',
  'the {feature} {is} {degree} {fine} and the {feature} {is} {degree} {fine}',
  '{opener} it {praise}',
  'it {praise} and {praise}',
  'it {praise} and the {feature} {is} {degree} {fine}',
  'i {love} the {feature}',
  'i {love} the {feature} and it {praise}',
  '{opener} this {product} {is} {degree} {fine}',
  'i would {recommend}',
  'the {feature} is not {bad}',
)
NEGATIVE = (
  '{opener} the {feature} {is} {degree} {foul}',
  'the {feature} {is} {degree} {foul} and the {feature} {is} {degree} {foul}',
  '{opener} it {complaint}',
  'it {complaint} and {complaint}',
  'it {complaint} and the {feature} {is} {degree} {foul}',
  'i {hate} the {feature}',
  'i {hate} the {feature} and it {complaint}',
  '{opener} this {product} {is} {degree} {foul}',
  'i {warn}',
  'i would not {recommend}',
  'the {feature} is not {good}',
  'it never {praise}',
)
MIXED = (
  'the {feature} {is} {degree} {fine} but the {feature} {is} {degree} {foul}',
  'the {feature} {is} {degree} {foul} but the {feature} {is} {degree} {fine}',
  'it {praise} but it {complaint}',
  'it {praise} but the {feature} {is} {degree} {foul}',
  'i {love} the {feature} but it {complaint}',
)
NEUTRAL = (
  '{opener} the {feature} is {plain}',
  'the {feature} is {plain} and the {feature} is {plain}',
  'i bought it {when}',
  'i use it {where}',
  'it came {extra}',
  'my {person} has the same {product}',
)
MOODS = {
  'positive': POSITIVE,
  'negative': NEGATIVE,
  'mixed': MIXED + POSITIVE + NEGATIVE,
  'neutral': NEUTRAL,
}
OCCASIONS = ('', '', '', ' after a week', ' after a year', ' from a friend', ' as a gift')
VERBS = frozenset(
  (*SLOTS['is'], *SLOTS['love'], *SLOTS['hate'], 'bought', 'use', 'came', 'has', 'would')
)

PRODUCTS = tuple(product for category in CATEGORIES for product in category.products)
