"""The words of the embedded data set: what people ask of a home and how they wrap it. Nothing is drawn here.

A name in braces stands for any row of the table of that name. `{do}` is what is wanted, `{other}` something named that
is not, `{settled}` a remark about a third thing.
"""

Rules = dict[str, tuple[str, ...]]


def one_of(rows: str) -> tuple[str, ...]:
    """The rows of a table, written with a bar between them."""
    return tuple(row.strip() for row in rows.split("|"))


WORDS: Rules = {
    "room": one_of("""
        kitchen | bedroom | hallway | bathroom | living room | lounge | study | attic | garage | nursery |
        dining room | guest room | cellar | utility room | playroom | conservatory | office | porch
    """),
    "lamp": one_of("light | lights | lamp | lamps | ceiling light | spots | big light | reading lamp | bulbs"),
    "on": one_of("turn on | switch on | put on | pop on | flick on"),
    "off": one_of("turn off | switch off | shut off | kill | knock off"),
    "door": one_of("front door | back door | garage door | side gate | patio door | cellar door | shed | porch door"),
    "blind": one_of("blinds | curtains | shutters | shades | roller blinds | drapes"),
    "heat": one_of("heating | thermostat | radiator | heat | boiler | underfloor heating"),
    "degrees": one_of("eighteen | nineteen | twenty | 21 | 22 degrees | 17 | nineteen and a half | 23 degrees"),
    "cleaner": one_of("vacuum | hoover | robot | robot vacuum | little cleaner | sweeper"),
    "minutes": one_of("two | five | ten | 12 | fifteen | 20 | twenty five | forty | ninety"),
    "chore": one_of("""
        lock up | close the blinds | take the lamp down | call mum | turn the oven off | feed the cat |
        open the curtains | stop the music | hoover the stairs | buy bread | switch the heating off
    """),
    "tune": one_of("""
        jazz | the morning news | rain sounds | my running mix | something quiet | a lullaby | old soul |
        songs for cooking | the lights down low playlist | the open door podcast | piano music | the cricket
    """),
    "item": one_of("""
        milk | eggs | light bulbs | batteries | oat biscuits | a curtain hook | vacuum bags | tea | rice |
        a new lock | an egg timer | lamp oil | tomatoes | headphones | dishwasher salt | two lemons
    """),
}

ASKS: Rules = {
    "lights_on": one_of("""
        {on} the {lamp} | {on} the {lamp} in the {room} | turn the {room} {lamp} on | light up the {room} |
        put the {lamp} on in the {room} | get the {room} {lamp} going | make the {lamp} brighter
    """),
    "lights_off": one_of("""
        {off} the {lamp} | {off} the {lamp} in the {room} | turn the {room} {lamp} off | make the {room} dark |
        put the {lamp} out in the {room} | get the {room} {lamp} off | leave the {room} without any light
    """),
    "heating": one_of("""
        set the {heat} to {degrees} | turn the {heat} up in the {room} | make the {room} a bit warmer |
        turn the {heat} down | put the {heat} on | cool the {room} down | get the {room} to {degrees}
    """),
    "music": one_of("""
        play {tune} | put on {tune} | put {tune} on in the {room} | let me hear {tune} | start {tune} |
        play {tune} until we close up | turn up {tune} in the {room} | play {tune} for {minutes} minutes
    """),
    "timer": one_of("""
        set a timer for {minutes} minutes | wake me in {minutes} minutes | put {minutes} minutes on the clock |
        remind me in {minutes} minutes to {chore} | tell me at half past to {chore} | count {minutes} minutes
    """),
    "lock": one_of("""
        lock the {door} | bolt the {door} | lock up | make the {door} safe for the night | shut and lock the {door} |
        see that the {door} is locked | arm the alarm on the {door} | put the {door} on the latch
    """),
    "blinds_open": one_of("""
        open the {blind} | pull the {blind} up in the {room} | let some daylight into the {room} |
        raise the {room} {blind} | draw back the {blind} | get the {blind} out of the way in the {room}
    """),
    "blinds_close": one_of("""
        close the {blind} | pull the {blind} down in the {room} | keep the sun out of the {room} |
        lower the {room} {blind} | draw the {blind} across | shut the {blind} in the {room}
    """),
    "vacuum": one_of("""
        start the {cleaner} | send the {cleaner} to the {room} | clean the floor in the {room} | hoover the {room} |
        let the {cleaner} do the {room} | get the crumbs off the {room} floor | run the {cleaner} round the {room}
    """),
    "shopping": one_of("""
        put {item} on the list | add {item} to the shopping | write down {item} | note that we need {item} |
        order {item} | get me {item} from the shop | add {item} and {item} to the list
    """),
}
"""Intent -> ways to ask for it, each an imperative, so that any of them fits after "don't", "did you", "i'll"."""

HINTS: Rules = {
    "lights_on": one_of("i can't see a thing in the {room} tonight | it is pitch black in the {room}, do something"),
    "lights_off": one_of("nobody needs the {lamp} in the {room} | i can't sleep with the {lamp} on in the {room}"),
    "heating": one_of("it's freezing in the {room} | we are sweating in the {room} | i'd like it at {degrees} in here"),
    "music": one_of("i'm in the mood for {tune} | it's too quiet in the {room}, how about {tune}"),
    "timer": one_of("the pasta wants {minutes} minutes, shout when it's done | don't let me forget to {chore}"),
    "lock": one_of("we are all in bed and the {door} is still unlocked | anyone could walk in through the {door}"),
    "blinds_open": one_of("""
        it's a lovely morning, i want to see the garden | the sun is up and the {blind} are still shut
    """),
    "blinds_close": one_of("the sun is in my eyes in the {room} | the neighbours can look straight into the {room}"),
    "vacuum": one_of("there is sand all over the {room} floor | the dog has left hair all over the {room}"),
    "shopping": one_of("we are out of {item} | there's no {item} left | we've run out of {item} and {item}"),
}
"""Intent -> ways to mean it without asking."""

SETTLED: Rules = {
    "lights": one_of("the {lamp} can stay like that | i've seen to the {lamp} in the {room}"),
    "heating": one_of("the {heat} is fine at {degrees} | it's warm enough in the {room}"),
    "music": one_of("{tune} can keep playing | i've stopped {tune} already"),
    "timer": one_of("the {minutes} minute timer is running | the timer went off"),
    "lock": one_of("the {door} is locked already | i've just shut the {door}"),
    "blinds": one_of("the {blind} are fine as they are | i've done the {blind} in the {room}"),
    "vacuum": one_of("the {cleaner} is charging | the {room} floor is clean"),
    "shopping": one_of("we have {item} | i've bought {item}"),
}
"""Device -> remarks that ask for nothing."""

PLAIN = one_of("""
    {do} | please {do} | can you {do} | could you {do} for me | i want you to {do} | would you {do} |
    i need you to {do} | be so kind and {do} | you may {do} now | don't forget to {do} | why don't you {do}
""")

TANGLED = one_of("""
    don't {other}, {do} | {do}, but don't {other} | {other}, no wait, {do} | {other}, sorry, i meant {do} |
    no need to {other}, just {do} | {do}, i'll {other} myself | i'll {other}, you {do} | rather than {other}, {do} |
    {do} rather than {other} | i said {do}, not {other} | you were about to {other} but {do} |
    never mind what i said, don't {other} but {do} | she'll {other} later, so {do} | {do}, nobody has to {other} |
    {settled}, {do} | {settled} so {do} | {do}, {settled} | {settled}, but {do} | {do}, by the way {settled}
""")

STATUS = one_of("""
    is the {door} locked | did i leave the {lamp} on in the {room} | how warm is it in the {room} |
    how many minutes are left on the timer | what is playing in the {room} | are the {blind} closed |
    what is on the shopping list | is the {cleaner} done with the {room} | did i put {item} on the list |
    has anyone touched the {heat} | which {lamp} did i leave on | what is the {heat} set to
""")

STATUS_TANGLED = one_of("""
    did you {other} | did anyone {other} | have i asked you to {other} yet | did you {other}, {settled} |
    what time did you {other} | do you know if mum told you to {other} | when did i tell you to {other} |
    {settled}, or did you {other} | can you tell me if anybody tried to {other}
""")

CANCEL = one_of("""
    never mind | forget it | cancel that | scratch that | leave everything as it is | forget what i just said |
    undo the last thing i asked | go back to how it was | i changed my mind, do nothing | stop what you are doing |
    that was a mistake, undo it | no, that's not what i meant, undo that | i didn't mean it, leave the {room} alone
""")

CANCEL_TANGLED = one_of("""
    {other}, no, forget it | don't {other} after all | i told you to {other}, cancel that | stop, don't {other} |
    i don't want you to {other} | {other}, oh never mind | scrap that, no need to {other} | you needn't {other} |
    {settled}, don't {other} | don't {other}, {settled} | nobody asked you to {other}
""")

FRAMES = {"status": (STATUS, STATUS_TANGLED), "cancel": (CANCEL, CANCEL_TANGLED)}
"""Plain and tangled sentences of the intents that have no `ASKS`; all others use PLAIN and TANGLED."""

OPENERS = one_of("hey house | okay | right | um | listen | hello there | so | computer | er | now then")
CLOSERS = one_of("please | thanks | love | mate | if you can | cheers | when you get a minute | quick as you like")
