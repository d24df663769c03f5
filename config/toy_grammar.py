"""The toy grammar of the demo: stories of three short sentences, preference pairs and minimal pairs made of the same.

    This king is in the kitchen with his cake.   who (agreement in number and gender), where, with what (which tell the topic)
    The cake is lovely and warm.                 what it is like (which tells the outcome)
    He is happy and eats the cake.               the ending, which follows from both

Eight topics with two outcomes each. All endings have one frame: what a model must know to prefer the right one is in the words, not in how long
or how usual an ending is. Edit it to make another toy language.
"""

import random
import re

HEROES = dict(
    he='boy boys|man men|king kings|brother brothers|uncle uncles|farmer farmers|father fathers|prince princes',
    she='girl girls|woman women|queen queens|sister sisters|aunt aunts|lady ladies|mother mothers|nurse nurses',
)
NAMES = dict(
    he='Tom Ben Max Jack Peter David Simon Oscar'.split(),
    she='Anna Lucy Mary Emma Kate Susan Laura Nina'.split(),
)
ADJECTIVES = (
    'old young small tall little big kind clever funny brave quiet busy shy proud polite famous lazy hungry sleepy noisy gentle rich '
    'poor strong careful friendly curious thin quick slow calm tired lucky wise bold honest cheerful lonely elegant'
).split()
COLOURS = 'red blue green yellow white black brown purple orange silver golden grey pink heavy tiny huge'.split()
NUMBERS = 'two three four five six seven eight nine'.split()
TIMES = 'today|tonight|again|on monday|on friday|on sunday|this morning|after lunch|before dinner|in winter|in summer|every spring'.split(
    '|'
)
MOODS = ('happy', 'glad'), ('sad', 'angry')
QUALITIES = ('new', 'clean', 'lovely', 'perfect'), ('broken', 'dirty', 'ruined', 'horrible')
PRONOUNS = dict(
    he=dict(he='he', his='his'), she=dict(he='she', his='her'), they=dict(he='they', his='their')
)
# topic: where / with what / what it is like / what the hero does then / what it is like instead / what the hero does then; '|' parts alternatives
TOPICS = {
    name: [part.split('|') for part in rest.split(' / ')]
    for name, rest in (
        line.split(': ')
        for line in """\
kitchen: in the kitchen|at the oven|in the bakery / cake cakes|soup soups|pie pies / warm|sweet / eat|taste / burnt|sour / throw away|spill
garden: in the garden|by the fence|under the tree / flower flowers|rose roses|carrot carrots / fresh|juicy / water|pick / dead|dry / dig out|bury
school: at school|in the classroom|beside the teacher / book books|pencil pencils|lesson lessons / easy|useful / study|learn / \
boring|difficult / forget|hate
football: on the field|in the stadium|at the game / ball balls|goal goals|trophy trophies / round|winning / kick|celebrate / flat|missing / lose|miss
sea: on the boat|at the beach|by the river / fish fish|net nets|shell shells / shiny|full / catch|pull up / empty|rotten / let go|drop
train: at the station|on the platform|in the train / ticket tickets|suitcase suitcases|map maps / cheap|valid / show|carry / \
expensive|stolen / search for|report
doctor: in the hospital|beside the doctor|at the clinic / pill pills|bandage bandages|medicine medicines / helpful|mild / take|use / \
bitter|painful / refuse|fear
music: on the stage|at the concert|in the choir / song songs|drum drums|violin violins / loud|famous / play|practise / silent|false / stop|ignore
""".strip().split('\n')
    )
}

SINGLE = (
    'this {one} is {place} with {his} {thing}',
    'one {one} is {place} with {his} {thing}',
    'there is one {one} {place} with {his} {thing}',
    'this {one} has {his} {thing} {place}',
    '{name} is {place} with {his} {thing}',
    'the {adjective} {one} is {place} with {his} {colour} {thing}',
    'this {one} is {place} with one {thing} {time}',
)
SEVERAL = (
    'these {many} are {place} with their {thing}',
    '{number} {many} are {place} with their {thing}',
    'there are {number} {many} {place} with their {thing}',
    'these {many} have their {thing} {place}',
    '{name} and {other} are {place} with their {thing}',
    'the {adjective} {many} are {place} with their {colour} {thing}',
    'these {many} are {place} with one {thing} {time}',
)
MINIMAL = dict(  # right, wrong, and their mirror image, right and wrong: what is right in one pair is wrong in the other
    this=(
        'this {one} is {there}',
        'these {one} is {there}',
        'these {many} are {there}',
        'this {many} are {there}',
    ),
    be=(
        'this {one} is {there}',
        'this {one} are {there}',
        'these {many} are {there}',
        'these {many} is {there}',
    ),
    number=(
        'one {one} is {there}',
        'one {one} are {there}',
        '{number} {many} are {there}',
        '{number} {many} is {there}',
    ),
    noun=(
        'one {one} is {there}',
        'one {many} is {there}',
        '{number} {many} are {there}',
        '{number} {one} are {there}',
    ),
    exist=(
        'there is one {one} {there}',
        'there are one {one} {there}',
        'there are {number} {many} {there}',
        'there is {number} {many} {there}',
    ),
    have=(
        'this {one} has {his} {thing} {place}',
        'this {one} have {his} {thing} {place}',
        'these {many} have their {thing} {place}',
        'these {many} has their {thing} {place}',
    ),
    gender=(
        'this {man} has his {thing} {place}',
        'this {man} has her {thing} {place}',
        'this {woman} has her {thing} {place}',
        'this {woman} has his {thing} {place}',
    ),
)


def finish(sentence):
    return sentence[0].upper() + sentence[1:] + '.'


def swap_number(ending):
    """'He is ...' -> 'He are ...' and back"""
    return (
        ending.replace(' is ', ' are ', 1)
        if ' is ' in ending
        else ending.replace(' are ', ' is ', 1)
    )


def cast(rng, topic, he):
    """What the sentences about heroes are filled with: their noun, what they have, where they are."""
    (one, many), (thing, _) = (
        rng.choice(words).split() for words in (HEROES[he].split('|'), TOPICS[topic][1])
    )
    (name, other), his, place = (
        rng.sample(NAMES[he], 2),
        PRONOUNS[he]['his'],
        rng.choice(TOPICS[topic][0]),
    )
    return dict(
        one=one,
        many=many,
        thing=thing,
        name=name,
        other=other,
        place=place,
        his=his,
        adjective=rng.choice(ADJECTIVES),
        time=rng.choice(TIMES),
        colour=rng.choice(COLOURS),
        number=rng.choice(NUMBERS),
        man=rng.choice(HEROES['he'].split('|')).split()[0],
        woman=rng.choice(HEROES['she'].split('|')).split()[0],
    )


def toy_story(rng, topic, outcome, who, mood):
    """One story as dict: prompt (two sentences) and the ending that follows. outcome: 0 good, 1 bad; who: he, she, they; mood: which of the two."""
    words = cast(rng, topic, who if who != 'they' else rng.choice(('he', 'she')))
    first = rng.choice(SEVERAL if who == 'they' else SINGLE).format(**words)
    qualities, (verb, _, rest) = (
        TOPICS[topic][2 + 2 * outcome],
        rng.choice(TOPICS[topic][3 + 2 * outcome]).partition(' '),
    )
    if who != 'they':
        verb += 'es' if re.search('(s|sh|ch)$', verb) else 's'
        verb = re.sub('([^aeiou])ys$', r'\1ies', verb)
    second = f'the {words["thing"]} is {rng.choice(QUALITIES[outcome])} and {rng.choice(qualities)}'
    feels = f'{PRONOUNS[who]["he"]} {"are" if who == "they" else "is"} {MOODS[outcome][mood]}'
    ending = f'{feels} and {verb} {rest + " " * bool(rest)}the {words["thing"]}'
    return dict(prompt=f'{finish(first)} {finish(second)}', ending=finish(ending), topic=topic)


def toy_couple(rng, contradict, fresh):
    """Two stories with their endings exchanged: each ending is right once and wrong once, so that preferring an ending as such gains nothing."""
    who, mood, outcome, topics = (
        rng.choice(('he', 'she', 'they')),
        rng.randrange(2),
        rng.randrange(2),
        rng.sample(list(TOPICS), 2),
    )
    if not contradict:
        one, two = (fresh(topic, outcome, who, mood) for topic in topics)
    else:  # the same thing, well and badly
        one, two = fresh(topics[0], 0, who, mood), fresh(topics[0], 1, who, mood)
        while one['ending'].split()[-1] != two['ending'].split()[-1]:
            two = fresh(topics[0], 1, who, mood)
    return dict(one, wrong=two['ending']), dict(two, wrong=one['ending'])


def toy_rows(task, seed, n_stories, n_pairs, n_suite):
    """Yields the rows of a task: stories (text), pairs (prompt, chosen, rejected), grammar, sstory, tstory (right, wrong, type, alike: one voice).

    Whatever is asked for is drawn in the same order, and nothing is drawn twice, neither a sentence of grammar's nor a story's prompt: no
    story, pair or context of an ending is shared between training and evaluation.
    """
    rng, used = random.Random(f'{seed}/toy'), set()

    def fresh(*what):
        while True:
            story = toy_story(rng, *what)
            if not used & {story['prompt'], story['prompt'].partition('.')[0] + '.'}:
                used.add(story['prompt'])
                return story

    def anything():
        return (
            rng.choice(list(TOPICS)),
            rng.randrange(2),
            rng.choice(('he', 'she', 'they')),
            rng.randrange(2),
        )

    n = 0
    while n < n_suite:
        kind = rng.choice([*MINIMAL, 'pronoun'])
        if kind == 'pronoun':  # the ending of a story: he is, he are; they are, they is
            topic, outcome, who, mood = anything()
            stories = [
                fresh(topic, outcome, who, mood) for who in (rng.choice(('he', 'she')), 'they')
            ]
            couple = [
                (
                    f'{story["prompt"]} {story["ending"]}',
                    f'{story["prompt"]} {swap_number(story["ending"])}',
                )
                for story in stories
            ]
        else:
            words = cast(rng, rng.choice(list(TOPICS)), he := rng.choice(('he', 'she')))
            there = [
                f'{words["place"]} with {his} {words["thing"]}'
                for his in (PRONOUNS[he]['his'], 'their')
            ]
            right, wrong, right2, wrong2 = (
                finish(frame.format(**words, there=there[i // 2]))
                for i, frame in enumerate(MINIMAL[kind])
            )
            couple = (right, wrong), (right2, wrong2)
        if not used & {right for right, _ in couple}:
            used |= {right for right, _ in couple}
            for right, wrong in couple if task == 'grammar' else ():
                yield dict(right=right, wrong=wrong, type=kind, alike=n // 2)
            n += 2
    for suite in ('sstory', 'tstory'):
        for i in range(n_suite // 2):
            for story in toy_couple(rng, suite == 'sstory', fresh):
                if task == suite:
                    right, wrong = (
                        f'{story["prompt"]} {story[which]}' for which in ('ending', 'wrong')
                    )
                    yield dict(right=right, wrong=wrong, type=story['topic'], alike=i)
    for i in range(n_pairs // 2):
        for story in toy_couple(rng, i % 2 == 0, fresh):
            if task == 'pairs':
                yield dict(prompt=story['prompt'], chosen=story['ending'], rejected=story['wrong'])
    for _ in range(n_stories if task == 'stories' else 0):
        story = fresh(*anything())
        yield dict(text=f'{story["prompt"]} {story["ending"]}')
