"""Everyday English words of three to six letters for :class:`tea_rl.envs.wordle.Wordle`.

Written down for this project, not copied from a published list; under the project's licence (Apache-2.0).
"""

from __future__ import annotations

_TEXT = """
ant arm art bag bat bed bee bin box boy bus cap car cat cow cup dog ear egg eye fan fig fly fox fun gas gum hat hen hut
ice ink jam jar key kid leg lip log map mud net nut oak oil owl pan pen pet pie pig pin pot rat rib rug sea sky sun tea
toe top toy van web wig

back bake ball band bank barn bath bean bear bell belt bird blue boat bone book boot bowl cake calm card cart cave city
clay coat coin cold cook corn crab dark deer desk dish door duck dust farm fish flag foot fork frog gate gift girl goat
gold hair hall hand hill home horn jump kite lake lamp leaf lion love milk mint moon nail neck nest nose pink plum pond
rain ring road rock roof rope rose salt sand seed ship shoe snow soap sock song soup star swan tent tree wall wind wing
wolf wood

angel apple beach berry black bread brick brown brush cabin camel candy chair chalk cheek chess chest child clock cloud
clown coast coral couch crane cream crown dance dream dress drink earth eagle fence field flame floor flour fruit ghost
glass glove grape grass green heart honey horse hotel house juice knife lemon light lunch maple medal melon metal money
month mouse mouth music night nurse ocean olive onion paint paper party peach pearl piano pilot plane plant plate queen
radio river robot round salad scarf sheep shelf shirt skirt sleep smile snail snake spoon stone storm sugar sweet table
tiger toast tooth torch tower train truck uncle voice watch water whale wheat wheel white woman world zebra

animal answer autumn banana basket beaver bottle branch bridge bucket butter button camera candle carpet carrot castle
cheese cherry coffee cookie copper cotton dinner doctor dragon engine family farmer father finger flower forest garden
ginger guitar hammer harbor helmet island jacket jungle kettle kitten ladder lizard market meadow mirror monkey mother
needle orange oyster parrot pencil pepper pillow planet pocket potato rabbit ribbon rocket school shadow silver sister
spider spring square street summer ticket tomato turtle valley violet walnut window winter
"""


def words_of(length: int) -> list[str]:
    """The listed words with ``length`` letters, in alphabetical order; empty when there are none.

    >>> words_of(3)[:2]
    ['ant', 'arm']
    """
    return sorted({word for word in _TEXT.split() if len(word) == length})


def word_lengths() -> list[int]:
    """The lengths that have words."""
    return sorted({len(word) for word in _TEXT.split()})
