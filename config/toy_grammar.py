"""The toy grammar of the demo: stories of four short sentences, whose ending follows from them; pairs and minimal pairs made of the same.

12 topics with two outcomes each. A story says who is where (agreement in number and gender), what goes on (which tells the topic), what happens
(which tells the outcome), and an ending that follows. Edit it to make another toy language.
"""
import random
import re

HEROES = dict(he='boy boys|man men|king kings|brother brothers|uncle uncles|farmer farmers',
              she='girl girls|woman women|queen queens|sister sisters|aunt aunts|lady ladies')
NAMES = dict(he='Tom Ben Max Jack Peter David'.split(), she='Anna Lucy Mary Emma Kate Susan'.split())
KIN = 'dog cat friend father mother baby'.split()
ADJECTIVES = 'old young small tall little big happy kind clever funny brave quiet'.split()
COLOURS = 'red blue green yellow white black brown new'.split()
NUMBERS = 'two three four five six'.split()
PRONOUNS = dict(he=dict(he='he', his='his'), she=dict(he='she', his='her'), they=dict(he='they', his='their'))
# topic: where / which things / what is going on / what happens / what follows from it / what happens instead / what follows from that.
# '|' parts alternatives; a [verb] agrees with the hero.
TOPICS = {name: [part.split('|') for part in rest.split(' / ')] for name, rest in (line.split(': ') for line in re.sub('\n +', ' ', """\
picnic: in the park|on the hill|by the lake / basket baskets|blanket blankets|sandwich sandwiches / {he} [want] a picnic on the grass|{he} [bring]
  bread and cheese for a picnic|{he} [put] the picnic under a tree / the sky is blue and the sun is warm|the clouds go away and the sun is bright|a
  warm sun shines in the blue sky / {he} [lie] in the warm sun and [smile]|{he} [eat] the picnic in the sunshine|{he} [play] on the dry grass in the
  sun / dark clouds come and the rain is cold|the wind is strong and the rain falls|a cold rain falls from the dark clouds / {he} [run] home in the
  cold rain|{he} [hide] from the rain in wet shoes|{he} [open] an umbrella in the dark rain
pet: in the street|near the bridge|behind the house / puppy puppies|collar collars|kitten kittens / {he} [look] for {his} lost puppy|{he} [call] the
  name of {his} puppy|{he} [ask] everyone about the lost puppy / the puppy barks behind a door|a neighbour finds the puppy|the puppy jumps out of a
  bush and barks / {he} [hug] the puppy and [kiss] its nose|{he} [give] the happy puppy a bone|{he} [carry] the puppy home and [laugh] / nobody sees
  the puppy all night|the street is empty and there is no puppy|the puppy never comes back / {he} [cry] for the puppy all night|{he} [go] home alone
  without the puppy|{he} [miss] the puppy and [cry]
doctor: at the doctor|in the hospital|beside the nurse / pill pills|bandage bandages|bottle bottles / {he} [have] a fever and a cough|{he} [tell] the
  doctor about the pain|{he} [show] the nurse {his} sore throat / the medicine works and the fever is gone|the nurse says the pain is over|the doctor
  takes the fever away / {he} [jump] out of bed and [feel] strong|{he} [thank] the doctor and [feel] healthy|{he} [leave] the hospital strong and
  healthy / the fever is high and the cough is bad|the medicine is weak and the pain grows|the doctor says the cough is very bad / {he} [stay] in bed
  with a bad cough|{he} [feel] weak and [sleep] in the hospital|{he} [shake] in bed with a high fever
baking: in the kitchen|at the oven|in the bakery / cake cakes|spoon spoons|bowl bowls / {he} [mix] butter and sugar for a cake|{he} [bake] a cake
  with eggs and flour|{he} [put] the cake into the oven / the cake is golden and smells sweet|the sweet cake rises in the oven|the cake comes out
  soft and golden / {he} [eat] the sweet cake with cream|{he} [cut] the golden cake into slices|{he} [share] the soft cake and the sweet cream /
  black smoke comes out of the oven|the oven is too hot and the cake burns|the cake is black and smells of smoke / {he} [throw] the burnt cake in the
  bin|{he} [cough] in the black smoke|{he} [scratch] black bits off the burnt cake
garden: in the garden|beside the fence|near the well / seed seeds|pot pots|shovel shovels / {he} [plant] seeds in the soil|{he} [dig] the soil for
  the seeds|{he} [water] the seeds in the garden / green leaves grow out of the soil|the seeds grow into fresh flowers|fresh flowers open in the
  garden / {he} [pick] the fresh flowers with joy|{he} [smell] the flowers and the green leaves|{he} [grow] more flowers in the green garden / snails
  come and eat every leaf|the soil is dry and the plants die|hungry snails kill the plants / {he} [pull] the dead plants from the dry soil|{he}
  [chase] the hungry snails away|{he} [burn] the dead dry plants
school: at school|in the classroom|near the teacher / pencil pencils|book books|ruler rulers / {he} [have] a test with many numbers|{he} [write] a
  test for the teacher|{he} [read] the questions in the test / every answer is right|the answers are quick and right|the teacher likes every answer /
  {he} [get] a gold star from the teacher|{he} [win] the best mark in the class|{he} [take] the gold star home with pride / the pencil breaks and the
  answers are wrong|every number is wrong|the teacher finds too many mistakes / {he} [fail] the test with many mistakes|{he} [must] write the wrong
  answers again|{he} [get] a low mark for the mistakes
football: on the football field|beside the goal|in the stadium / ball balls|shirt shirts|whistle whistles / {he} [play] football for {his} team|{he}
  [kick] the ball to the team|{he} [wear] the shirt of the football team / {his} team scores the last goal|the ball flies into the goal and the team
  cheers|the team scores three goals / {he} [lift] the silver cup with the team|{he} [cheer] and [kiss] the silver cup|{he} [dance] because the team
  wins the cup / the other team scores nine times|the ball hits {his} foot and the others win|the other team is much too fast / {he} [lose] the game
  without a prize|{he} [walk] off slowly after the lost game|{he} [kick] the mud because the others win
fishing: on the boat|at the river|on the beach / net nets|hook hooks|bucket buckets / {he} [throw] the net into the deep water|{he} [wait] for fish
  on the waves|{he} [hold] the line in the water / a big fish pulls the line|the net is full of fish|many silver fish swim into the net / {he} [fry]
  the big fish for dinner|{he} [sell] the full net of fish|{he} [cook] fish soup on the boat / the net has a hole and is empty|no fish swims in the
  water|a shark bites the line in half / {he} [sail] home with an empty net|{he} [eat] old bread for there is no fish|{he} [mend] the hole in the
  empty net
birthday: at the birthday party|in the living room|beside the table / candle candles|balloon balloons|present presents / {he} [turn] seven today and
  [wait] for guests|{he} [invite] everyone to the birthday|{he} [light] the birthday candles / the guests come with songs and presents|the bell rings
  and all guests are here|music plays and the guests sing / {he} [open] all the presents and [sing]|{he} [dance] with the guests to the music|{he}
  [unpack] a toy and [thank] the guests / nobody rings the bell|no guests come and the house is silent|the guests forget the birthday / {he} [blow]
  out the candles alone|{he} [sit] alone in the silent room|{he} [put] the plates away in silence
train: at the station|on the platform|beside the train / ticket tickets|suitcase suitcases|map maps / {he} [travel] to the city by train|{he} [buy] a
  ticket for the train|{he} [need] a train to the city / the train comes early with free seats|the doors open and the seats are free|a fast train
  stops at the platform / {he} [find] a seat by the window|{he} [ride] fast through the hills|{he} [look] out of the window of the fast train / the
  clock is late and the train is gone|the train leaves without a sound|all trains stop because of snow / {he} [sleep] on a bench in the snow|{he}
  [come] too late and [stand] in the snow|{he} [wait] for hours on the cold bench
market: at the market|in the shop|in the village square / apple apples|carrot carrots|pear pears / {he} [sell] fruit and eggs to people|{he} [bring]
  fresh fruit to the market|{he} [shout] the price of the fruit / many people buy the fruit|people pay good money for the eggs|a rich lady buys
  everything / {he} [count] the coins in {his} purse|{he} [go] to the bank with the money|{he} [fill] {his} purse with money and coins / nobody stops
  and nobody buys|the eggs break and the fruit is bad|worms eat the bad fruit / {he} [pack] the bad fruit back into boxes|{he} [push] the heavy boxes
  home|{he} [clean] the broken eggs off the boxes
camping: in the forest|near the tent|on the mountain / lamp lamps|rope ropes|backpack backpacks / {he} [build] a tent in the forest|{he} [camp] under
  the tall trees|{he} [gather] wood for the fire / the stars shine and the fire is bright|the moon shines on the forest|the fire is warm and the
  stars are clear / {he} [tell] tales under the moon and stars|{he} [roast] nuts over the bright fire|{he} [watch] the stars beside the fire / a wolf
  howls near the tent|an angry bear comes to the tent|a bear and a wolf fight in the dark / {he} [climb] a tree to escape the bear|{he} [scream] at
  the wolf|{he} [flee] from the angry bear""").split('\n'))}


def conjugate(sentence, who):
    """'{he} [want] {his} tea' for who in he, she, they -> 'She wants her tea.'"""
    def verb(match):
        stem = match[1]
        if who == 'they' or stem == 'must':
            return stem
        ending = 'es' if re.search('(s|sh|ch|x|z|o)$', stem) else 's'
        return 'has' if stem == 'have' else stem[:-1] + 'ies' if re.search('[^aeiou]y$', stem) else stem + ending
    sentence = re.sub(r'\[(\w+)\]', verb, sentence.format(**PRONOUNS[who]))
    return sentence[0].upper() + sentence[1:] + '.'


def cast(rng, topic, he):
    """What the sentences about heroes are filled with: their noun, what they have, where they are."""
    (one, many), (thing, things) = (rng.choice(words).split() for words in (HEROES[he].split('|'), TOPICS[topic][1]))
    name, other = rng.sample(NAMES[he], 2)
    return dict(one=one, many=many, thing=thing, things=things, name=name, other=other, place=rng.choice(TOPICS[topic][0]), his=PRONOUNS[he]['his'],
                adjective=rng.choice(ADJECTIVES), colour=rng.choice(COLOURS), number=rng.choice(NUMBERS), kin=rng.choice(KIN))


SINGLE = ('this {one} is', 'this {adjective} {one} is', 'one {one} is', 'the {one} is', 'there is one {adjective} {one}', 'the {one} has {his} {thing}',
          'the {adjective} {one} is', 'the {one} has {number} {things}', '{name} is with {his} {kin}', 'this {one} has one {colour} {thing}')
SEVERAL = ('these {many} are', 'these {adjective} {many} are', '{number} {many} are', 'the {many} are', 'there are {number} {adjective} {many}',
           'the {adjective} {many} are', 'the {many} have {number} {things}', '{name} and {other} are', 'these {many} have {number} {things}')
MINIMAL = dict(  # right, wrong, and their mirror image, right and wrong: what is right in one pair is wrong in the other
    this=('this {one} is', 'these {one} is', 'these {many} are', 'this {many} are'),
    number=('there is one {one}', 'there is one {many}', 'there are {number} {many}', 'there are {number} {one}'),
    be=('the {one} is', 'the {one} are', 'the {many} are', 'the {many} is'),
    adjective=('the {adjective} {one} is', 'the {adjective} {one} are', 'the {adjective} {many} are', 'the {adjective} {many} is'),
    have=('the {one} has {number} {things}', 'the {one} have {number} {things}', 'the {many} have {number} {things}', 'the {many} has {number} {things}'),
    gender=('the {man} has his {thing}', 'the {man} has her {thing}', 'the {woman} has her {thing}', 'the {woman} has his {thing}'),
    pronoun=('the {one} is {place}. {he} {verbs}', 'the {one} is {place}. they {verb}', 'the {many} are {place}. they {verb}',
             'the {many} are {place}. {he} {verbs}'))


def toy_story(rng, topic, outcome=None, who=None):
    """One story as dict: prompt (three sentences) and the ending that follows from it. outcome: 0 or 1; who: he, she, they; None draws."""
    outcome = rng.randrange(2) if outcome is None else outcome
    who = who or rng.choice(('he', 'she', 'they'))
    first = rng.choice(SEVERAL if who == 'they' else SINGLE) + ' {place}'
    doing, events, endings = TOPICS[topic][2], *TOPICS[topic][3 + 2 * outcome:5 + 2 * outcome]
    prompt = [conjugate(first.format(**cast(rng, topic, who if who != 'they' else rng.choice(('he', 'she')))), who)]
    prompt += [conjugate(rng.choice(parts), who) for parts in (doing, events)]
    return dict(prompt=' '.join(prompt), ending=conjugate(rng.choice(endings), who), topic=topic)


def toy_couple(rng, contradict, fresh):
    """Two stories with their endings exchanged: each ending is right once and wrong once, so that preferring an ending as such gains nothing."""
    who, topics = rng.choice(('he', 'she', 'they')), rng.sample(list(TOPICS), 2)
    one, two = (fresh(topics[0], i, who) if contradict else fresh(topics[i], None, who) for i in range(2))
    return dict(one, wrong=two['ending']), dict(two, wrong=one['ending'])


def toy_minimal(rng):
    """Two minimal pairs, (right, wrong) each, that mirror each other, and what agreement they break."""
    kind, topic, he = rng.choice(list(MINIMAL)), rng.choice(list(TOPICS)), rng.choice(('he', 'she'))
    doing = rng.choice(TOPICS[topic][2]).partition(' ')[2]
    words = cast(rng, topic, he) | {sex: cast(rng, topic, who)['one'] for sex, who in (('man', 'he'), ('woman', 'she'))}
    words |= {form: conjugate('. ' + doing, who)[2:-1] for form, who in (('verbs', he), ('verb', 'they'))} | dict(he=he.title())
    place = '' if kind == 'pronoun' else ' {place}'
    right, wrong, right2, wrong2 = (re.sub('[.] t', '. T', conjugate((frame + place).format(**words), he)) for frame in MINIMAL[kind])
    return kind, ((right, wrong), (right2, wrong2))


def toy_rows(task, seed, n_stories, n_pairs, n_suite):
    """Yields the rows of a task: stories (text), pairs (prompt, chosen, rejected), grammar, sstory, tstory (right, wrong, type, alike: one voice).

    Whatever is asked for is drawn in the same order, and nothing is drawn twice, neither a sentence of grammar's nor a story's prompt: no
    story, pair or context of an ending is shared between training and evaluation.
    """
    rng, used = random.Random(f'{seed}/toy'), set()

    def fresh(topic, outcome=None, who=None):
        while True:
            story = toy_story(rng, topic, outcome, who)
            parts = re.findall('[^.]+[.]', story['prompt'])
            if not used & {story['prompt'], parts[0], parts[0] + parts[1]}:
                used.add(story['prompt'])
                return story

    n = 0
    while n < n_suite:
        kind, couple = toy_minimal(rng)
        if not used & {right for right, _ in couple}:
            used |= {right for right, _ in couple}
            for right, wrong in couple if task == 'grammar' else ():
                yield dict(right=right, wrong=wrong, type=kind, alike=n // 2)
            n += 2
    for suite in ('sstory', 'tstory'):
        for i in range(n_suite // 2):
            for story in toy_couple(rng, suite == 'sstory', fresh):
                if task == suite:
                    right, wrong = (f'{story["prompt"]} {story[which]}' for which in ('ending', 'wrong'))
                    yield dict(right=right, wrong=wrong, type=story['topic'], alike=i)
    for i in range(n_pairs // 2):
        for story in toy_couple(rng, i % 2 == 0, fresh):
            if task == 'pairs':
                yield dict(prompt=story['prompt'], chosen=story['ending'], rejected=story['wrong'])
    for _ in range(n_stories if task == 'stories' else 0):
        story = fresh(rng.choice(list(TOPICS)))
        yield dict(text=f'{story["prompt"]} {story["ending"]}')
