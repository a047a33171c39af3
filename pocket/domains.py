"""Domains: abstract schemas with seeded rows, hand-written for the pocket data set or made up for pretraining.

All schemas, word lists and value pools here are our own; nothing is taken from another data set. The same
`random.Random` state always gives the same domain and rows. `SEEN` domains may be used in pretraining and training,
`UNSEEN` ones only in evaluation: their words are kept out of the made-up schemas too (`NOVEL_WORDS`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date, timedelta
from random import Random

Row = tuple[int | float | str | None, ...]

SEEN_TEXT = """
concert
  stadium: stadium_id; name=place; city=city; capacity=400-9900; average_attendance?=90-9000
  singer: singer_id; name=person; country=country; age=18-70; net_worth?=1.5-60.0
  concert: concert_id; title=title; theme=rock|jazz|folk|pop|soul; concert_date=date; stadium_id>stadium
  performance: performance_id; concert_id>concert; singer_id>singer; songs=2-30
shop
  shop: shop_id; name=place; location=city; manager?=person; open_year=1950-2020
  product: product_id; product_name=title; category=toys|food|books|garden|sports; price=1.5-99.0; weight?=5-900
  purchase: purchase_id; product_id>product; shop_id>shop; quantity=1-60; status=paid|pending|returned; purchase_date=date
flight
  airline: airline_id; name=firm; country=country; fleet_size=5-400
  airport: airport_id; airport_name=place; city=city; elevation?=2-3900
  flight: flight_id; airline_id>airline; airport_id>airport; distance=90-9800; price=40-1900; aircraft=jet|turboprop|glider
library
  author: author_id; name=person; nationality=country; birth_year=1900-1995
  book: book_id; title=title; genre=crime|poetry|history|travel|drama; pages?=60-900; publication_year=1950-2023; author_id>author
  member: member_id; name=person; membership_level=basic|silver|gold; age=15-80
  loan: loan_id; book_id>book; member_id>member; days=1-60; loan_date=date
company
  department: department_id; name=title; building=North Wing|South Wing|Tower|Annex; budget=200-9000
  employee: employee_id; name=person; job_title=clerk|engineer|analyst|driver|cook; salary=1800-9900; age?=20-66; department_id>department
  project: project_id; project_name=title; status=open|closed|on hold; cost=50-9000; department_id>department
school
  teacher: teacher_id; name=person; hometown=city; age=24-66
  course: course_id; course_name=title; subject=maths|art|music|biology|law; credits=1-30; teacher_id>teacher
  student: student_id; last_name=surname; major=maths|art|music|biology|law; age=17-40; gpa?=1.1-4.0
  enrollment: enrollment_id; student_id>student; course_id>course; grade=A|B|C|D|F
cars
  maker: maker_id; maker_name=firm; country=country; founded_year=1890-2015
  car: car_id; model=title; fuel_type=petrol|diesel|electric|hybrid; horsepower=50-600; mpg?=11.0-60.0; maker_id>maker
  dealer: dealer_id; name=firm; city=city; rating=1.0-5.0
  sale: sale_id; car_id>car; dealer_id>dealer; amount=400-9900; sale_date=date
pets
  owner: owner_id; name=person; city=city; age=18-90
  pet: pet_id; pet_name=first; pet_type=dog|cat|parrot|rabbit; weight?=0.5-60.0; owner_id>owner
  treatment: treatment_id; pet_id>pet; reason=vaccine|injury|dental|checkup; cost=15-900; treatment_date=date
cinema
  director: director_id; name=person; nationality=country; birth_year=1930-1995
  movie: movie_id; title=title; genre=comedy|horror|drama|western; release_year=1960-2023; gross?=100-9000; director_id>director
  cinema: cinema_id; name=place; location=city; capacity=60-900
  screening: screening_id; movie_id>movie; cinema_id>cinema; ticket_price=4.0-25.0
tennis
  player: player_id; name=person; country=country; height=155-210; hand=left|right
  tournament: tournament_id; name=title; surface=clay|grass|hard|carpet; prize_money=500-9900; year=1980-2023
  game: game_id; tournament_id>tournament; player_id>player; minutes?=40-320; round=first|second|semifinal|final
restaurant
  restaurant: restaurant_id; name=place; cuisine=thai|french|mexican|indian; rating=1.0-5.0; city=city
  meal: meal_id; meal_name=title; price=4.0-60.0; calories?=90-1900; restaurant_id>restaurant
  review: review_id; restaurant_id>restaurant; stars=1-10; reviewer=person; review_date=date
bank
  branch: branch_id; branch_name=place; city=city; assets=100-9900
  customer: customer_id; name=person; state=Ohio|Texas|Utah|Maine|Iowa; credit_score?=300-850
  account: account_id; customer_id>customer; branch_id>branch; balance=10-9000; account_type=savings|checking|joint
museum
  museum: museum_id; name=place; city=city; num_of_staff=4-300; open_year=1850-2015
  visitor: visitor_id; name=person; level_of_membership=none|friend|patron; age?=6-90
  visit: visit_id; museum_id>museum; visitor_id>visitor; num_of_ticket=1-12; total_spent=5.0-200.0
hotel
  hotel: hotel_id; name=place; city=city; stars=1-50; built_year=1900-2020
  room: room_id; room_type=single|double|suite; floor=1-40; daily_rate=40-900; hotel_id>hotel
  guest: guest_id; name=person; country=country; age?=18-90
  booking: booking_id; room_id>room; guest_id>guest; nights=1-40; booking_date=date
gym
  trainer: trainer_id; name=person; specialty=yoga|boxing|rowing|dance; experience=1-40
  workout: workout_id; workout_name=title; intensity=low|medium|high; duration=15-150; trainer_id>trainer
  client: client_id; name=person; gender=female|male|other; weight?=45-140; height=150-205
  attendance: attendance_id; workout_id>workout; client_id>client; calories_burned=60-1200
"""

UNSEEN_TEXT = """
hospital
  physician: physician_id; name=person; clinic=city; salary=300-9900; seniority=1-40
  patient: patient_id; name=person; blood_type=A|B|AB|O; age=1-95; city=city; insurance_code?=100-900
  appointment: appointment_id; physician_id>physician; patient_id>patient; urgency=routine|urgent|emergency; waiting_days=1-90
orchestra
  conductor: conductor_id; name=person; nationality=country; age=28-80; year_of_debut=1960-2015
  orchestra: orchestra_id; orchestra_name=place; record_company=Opal|Lyra|Nimbus|Vela; founded_year=1850-2010; conductor_id>conductor
  recital: recital_id; orchestra_id>orchestra; programme=symphony|chamber|opera; audience?=80-3000; recital_date=date
farm
  farm: farm_id; farm_name=place; district=Upland|Valley|Coast|Plain; hectares=4-900; workers=2-90
  crop: crop_id; crop_name=title; season=spring|summer|autumn|winter; harvest_tons?=1.0-90.0; farm_id>farm
  tractor: tractor_id; brand=Ursa|Taurus|Aries|Draco; engine_power=30-400; purchase_year=1980-2022; farm_id>farm
harbor
  captain: captain_id; name=person; rank=junior|senior|chief; age=25-70
  vessel: vessel_id; vessel_name=title; class=tanker|ferry|tug|liner; tonnage=90-9000; built_year=1960-2020; captain_id>captain
  dock: dock_id; dock_name=place; country=country; depth?=4.0-40.0
  voyage: voyage_id; vessel_id>vessel; dock_id>dock; cargo=coal|grain|timber|oil; days_at_sea=2-90
vineyard
  winery: winery_id; winery_name=place; region=Alsace|Rioja|Mosel|Tokaj; acreage=5-700; owner=person
  grape: grape_id; grape_name=title; color=red|white; ripening_weeks=10-40
  wine: wine_id; label=title; winery_id>winery; grape_id>grape; vintage=1970-2022; score=60-100; bottle_price?=4.0-300.0
election
  borough: borough_id; borough_name=place; province=Northern|Southern|Eastern|Western; population=900-9900; turnout?=20.0-90.0
  politician: politician_id; name=person; party=Green|Liberal|Labour|Union; age=25-80; borough_id>borough
  survey: survey_id; politician_id>politician; pollster=Delta|Sigma|Omega; support=1.0-70.0; survey_date=date
observatory
  observatory: observatory_id; name=place; country=country; altitude=90-5000
  telescope: telescope_id; nickname=first; mirror_size=0.5-12.0; band=radio|optical|infrared; observatory_id>observatory
  astronomer: astronomer_id; name=person; institute=Kepler|Halley|Hubble; papers?=1-300
  observation: observation_id; telescope_id>telescope; astronomer_id>astronomer; target=comet|nebula|quasar|pulsar; exposure=5-900
railway
  station: station_id; station_name=place; city=city; platforms=1-24; founding_year=1840-2010
  train: train_id; train_name=title; operator=firm; top_speed=80-350; seats?=60-900
  ticket: ticket_id; train_id>train; station_id>station; fare=3.0-200.0; carriage=first|second|sleeper; travel_date=date
"""

_WORDS = """
action actor address agency album alert amount animal answer apple archive arena army artist asset atlas award bag
ball band bar barrel base basket battery beach bed bench bicycle bill bird block board boat body bond border bottle box
brain bread bridge broker budget bus button cabin cable cake camera camp canal candle card career carrier castle cell
center chain chair channel chapter charge chart chef chemical child church circle circuit city client climate clock
cloud club coach code coin collection college color comment committee computer contact container contest contract
cook copy corner council country couple court cover cow craft credit crew culture currency cycle dance date deal debt
degree delivery demand deposit design desk detail device diet discount disease doctor document dollar door draft dream
dress drink drive driver drug duty editor effect element email energy engine entry episode error estate event exam
exchange expert export fabric face factor factory family fan fashion feature fee field file film filter fire firm fish
flag flavor fleet flower folder forest format forum frame fruit fuel fund future gallery garage garden gas gate gift
glass goal gold grain group growth guard guide hall harbor height hero hill history hobby home horse host hour house
humor ice icon idea image import income index industry inspector instrument insurance interest island issue item jacket
job judge juice jury kernel key kid kitchen knife lab label lake lamp land language laptop law lawyer layer leader
league leaf lecture lens lesson letter license life light limit line link list liquid load local lock log loss lot
machine mail map margin market mask master material matter mayor meal measure media medal meeting memory menu message
metal method metric milk mine mission mixer mobile mode moment money monitor month mood mountain movement muscle music
nation network news night node noise note notice novel number object ocean offer office oil option orange organ origin
outcome outlet output oven package page pain paint panel paper park partner party passenger path pattern payment peak
pen pension people permit person phase phone photo piano picture piece pilot pipe pitch plane planet plant plate plot
poem point policy pool port position post potato pound power practice president press prince printer prison prize
process profile profit program protein pump purpose quality quarter queen quiz race radio rain range rank ratio record
refund region relation rent repair reply report request rescue resort resource response result reward rice ring risk
river road robot rocket role roof root rope route rule runner safety sail salad sample sand scale scene scholar score
screen script sea season seat sector seed sensor server service session share sheet shelf shell shift ship shirt shoe
shower side signal silver site size skill skin sky snow soap soil soldier solution song sound soup source space speaker
speed sponsor sport spot square staff stage stamp star statue step stock stone storage store storm story stove strategy
stream street stress studio style sugar suit supplier surface symbol system tail talent tank tape task tax taxi team
technology temple tenant tent term test text theater theory thread tide timber tire title toast tool tooth topic total
tour tower town toy track trade tradition traffic trail trailer tree trend trial trick trip truck trust tube tunnel type
unit upgrade user vaccine valley value van vendor venue version victim video view village virus vision voice volume
wage wall warehouse watch water wave weapon web wedding week wheel width wind window wing winner winter wire wood worker
workshop world writer yard zone
"""

KEYWORDS = frozenset(
    """abort action add after all alter analyze and any as asc attach avg before begin between by cascade case cast check
    collate column commit conflict constraint count create cross current database default delete desc detach distinct
    do drop each else end escape except exclude exists explain fail filter first following for foreign from full glob
    group groups having if ignore in index inner insert instead intersect into is isnull join key last left like limit
    match max min natural no not nothing notnull null nulls of offset on or order others outer over partition plan
    pragma preceding primary query raise range recursive references regexp reindex release rename replace restrict
    returning right rollback row rows savepoint select set sum table temp temporary then ties to transaction trigger
    unbounded union unique update user using vacuum values view virtual when where window with without list show find
    which what how many different than least most number average total false true the who whose have has every""".split()
)
"""Words never used as made-up identifiers: SQL keywords and the operation words of the questions."""

_NAMES = ("name", "title")
_CATEGORIES = "city country type category status location nationality gender level color region language".split()
_QUANTITIES = "age price salary weight height capacity rating population budget amount length distance score".split()
_YEARS = ("year", "open_year", "release_year", "birth_year")

_FIRST = (
    "James Mary Ahmed Lucia Chen Olga Pedro Aisha Tom Nina Ravi Yuki Omar Elena Paul Zoe Ivan Kim Sara Luis Anna John "
    "Rosa Hugo Lena Otto Ines Mark Ruth Joe Dana Kofi José Renée Zoë André Björn Chloé Sofía Jürgen"
).split()
_LAST = (
    "Smith Garcia Kim Patel Ivanov Sato Brown Lopez Rossi Silva Khan Novak Adams Baker Costa Diaz Evans Fox Grant Hill "
    "Jones Lee Moore Nash Owen Price Reed Stone Müller Peña Gonçalves Dvořák O'Brien O'Neill D'Angelo O'Hara"
).split()
_CITIES = (
    "Paris London Boston Tokyo Berlin Madrid Dallas Austin Denver Oslo Rome Lima Cairo Delhi Sydney Chicago Miami "
    "Toronto Dublin Athens Málaga Zürich Köln"
).split()
_COUNTRIES = "France Japan Brazil Canada Spain Italy Kenya India Norway Egypt Chile Ghana Peru Poland Turkey".split()
_FRONT = (
    "Blue Golden Silent Grand Little Wild Royal Old Bright Hidden Iron Lucky Quiet Rapid Sunny Velvet Winter Crystal "
    "Lonely Noble Red Stormy Gentle Proud"
).split()
_BACK = (
    "River Garden Star Harvest Mountain Valley Crown Lantern Meadow Falcon Bridge Ocean Tiger Comet Forest Arrow Mirror "
    "Rose Anchor Summit Pearl Feather Thunder Willow"
).split()
_FIRM = "Air Works Group Motors Lines Brothers Partners Industries".split()

_POOLS = {"city": _CITIES, "country": _COUNTRIES}


@dataclass(frozen=True)
class Field:
    """One column of a domain: what it means, not only how it is stored."""

    name: str
    kind: str
    """``id``, ``key`` (foreign), ``name``, ``category``, ``integer``, ``real``, ``year`` or ``date``."""
    pool: tuple[str, ...] = ()
    """Categories to draw from, or for a ``name`` the one way in which it is made."""
    low: float = 0
    high: float = 0
    nullable: bool = False
    ref: str = ""
    """Table that a ``key`` refers to (its ``id`` column)."""


@dataclass
class Domain:
    """Tables in dependency order (a key refers to an earlier table), and their rows once filled."""

    name: str
    tables: dict[str, list[Field]]
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def primary(self, table: str) -> str | None:
        """Name of the id column, None for a pure link table."""
        return next((f.name for f in self.tables[table] if f.kind == "id"), None)

    def links(self) -> list[tuple[str, str, str, str]]:
        """All foreign keys as (table, column, referred table, its id column)."""
        return [
            (table, f.name, f.ref, self.primary(f.ref) or "")
            for table, fields in self.tables.items()
            for f in fields
            if f.kind == "key"
        ]

    def values(self, table: str, column: str) -> list:
        """Values of a column that are not NULL, in row order."""
        cells = (self.cell(table, i, column) for i in range(len(self.rows[table])))
        return [cell for cell in cells if cell is not None]

    def cell(self, table: str, row: int, column: str) -> int | float | str | None:
        """One value."""
        return self.rows[table][row][[f.name for f in self.tables[table]].index(column)]


def _parse_field(table: str, text: str) -> Field:
    if ">" in text:
        name, ref = text.split(">")
        return Field(name, "key", ref=ref)
    if "=" not in text:
        return Field(text, "id")
    name, spec = text.split("=")
    name, nullable = name.removesuffix("?"), name.endswith("?")
    if spec in ("person", "surname", "first", "title", "firm", "place"):
        return Field(name, "name", (spec,), nullable=nullable)
    if spec == "date":
        return Field(name, "date", nullable=nullable)
    if span := re.fullmatch(r"([\d.]+)-([\d.]+)", spec):
        kind = "real" if "." in spec else "year" if re.search(r"year|vintage", name) else "integer"
        return Field(name, kind, low=float(span[1]), high=float(span[2]), nullable=nullable)
    return Field(name, "category", tuple(_POOLS.get(spec) or spec.split("|")), nullable=nullable)


def _parse(text: str) -> list[Domain]:
    domains: list[Domain] = []
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            domains.append(Domain(line, {}))
            continue
        table, columns = line.strip().split(": ")
        domains[-1].tables[table] = [_parse_field(table, c) for c in columns.split("; ")]
    return domains


def seen_domains() -> list[Domain]:
    """Fresh copies of the domains that training may use, without rows."""
    return _parse(SEEN_TEXT)


def unseen_domains() -> list[Domain]:
    """Fresh copies of the domains kept for evaluation, without rows."""
    return _parse(UNSEEN_TEXT)


def _identifier_words(domains: list[Domain]) -> set[str]:
    names = {n for d in domains for table, fields in d.tables.items() for n in (table, *(f.name for f in fields))}
    return {word for name in names for word in name.split("_")}


NOVEL_WORDS = (
    _identifier_words(unseen_domains()) - _identifier_words(seen_domains()) - {*_QUANTITIES, *_CATEGORIES, "of", "at"}
)
"""Words of unseen schemas that no pretraining identifier may use."""
WORDS = sorted(set(_WORDS.split()) - NOVEL_WORDS - KEYWORDS)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _name(rng: Random, style: str) -> str:
    if style == "person":
        return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
    if style == "surname":
        return rng.choice(_LAST)
    if style == "first":
        return rng.choice(_FIRST)
    if style == "firm":
        return f"{rng.choice(_BACK)} {rng.choice(_FIRM)}"
    if style == "place":
        return (
            f"{rng.choice(_FRONT)} {rng.choice(_BACK)}"
            if rng.random() < 0.7
            else f"{rng.choice(_LAST)} {rng.choice(_BACK)}"
        )
    return f"{rng.choice(_FRONT)} {rng.choice(_BACK)}"


def _unique(rng: Random, size: int, make) -> list:
    found: dict = {}
    for _ in range(size * 40):
        found.setdefault(make(), None)
        if len(found) == size:
            break
    values = list(found)
    return [values[i % len(values)] for i in range(size)]


def _column(rng: Random, f: Field, size: int, domain: Domain) -> list:
    if f.kind == "id":
        first = rng.choice((1, 1, 101))
        return list(range(first, first + size))
    if f.kind == "key":
        ids = domain.values(f.ref, domain.primary(f.ref) or "")
        used = rng.sample(ids, max(2, len(ids) * 3 // 4))
        weights = [1 + rng.random() * 3 for _ in used]
        return rng.choices(used, weights, k=size)
    if f.kind == "name":
        if f.pool[0] == "made":
            return (
                rng.sample(f.pool[1:], size)
                if size < len(f.pool)
                else [f.pool[1 + i % (len(f.pool) - 1)] for i in range(size)]
            )
        return _unique(rng, size, lambda: _name(rng, f.pool[0]))
    if f.kind == "category":
        pool = rng.sample(f.pool, min(len(f.pool), rng.randint(4, 7)))
        return rng.choices(pool, [1 + rng.random() * 2 for _ in pool], k=size)
    if f.kind == "date":
        start = date(2015, 1, 1)
        return _unique(rng, size, lambda: (start + timedelta(days=rng.randrange(3200))).isoformat())
    if f.kind == "real":
        return _unique(rng, size, lambda: round(rng.uniform(f.low, f.high), 1))
    return _unique(rng, size, lambda: rng.randint(int(f.low), int(f.high)))


def fill(domain: Domain, rng: Random, size: int | None = None) -> Domain:
    """Fill every table with rows (numbers distinct where their range allows it) and return the domain.

    Args:
        size: rows per table; by default 18-30, and 45-70 in tables that refer to two others.
    """
    domain.rows = {}
    for table, fields in domain.tables.items():
        many = sum(f.kind == "key" for f in fields) > 1
        n = size or (rng.randint(45, 70) if many else rng.randint(18, 30))
        columns = []
        for f in fields:
            column = _column(rng, f, n, domain)
            if f.nullable and size is None:
                column = [None if rng.random() < 0.12 else v for v in column]
            columns.append(column)
        domain.rows[table] = list(zip(*columns, strict=True))
    return domain


# ---- made-up domains for pretraining --------------------------------------------------------------------------------


class Inventor:
    """Makes up schemas whose identifiers are partly real words, partly pseudo-words, so that a model learns to copy.

    Args:
        starts, middles: word pieces of the tokenizer (with and without a leading space); syllables are used without.
    """

    def __init__(self, starts: list[str] | None = None, middles: list[str] | None = None) -> None:
        self.starts, self.middles = starts or [], middles or []

    def word(self, rng: Random) -> str:
        """A word of the list or, in 45 of 100 cases, a pseudo-word."""
        for _ in range(20 if rng.random() < 0.45 else 0):
            if self.starts and rng.random() < 0.75:
                word = rng.choice(self.starts) + "".join(rng.choices(self.middles, k=rng.choice((1, 2, 2, 3, 3, 4))))
            else:
                syllables = rng.choice((2, 2, 3))
                word = "".join(
                    rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "t"))
                    for _ in range(syllables)
                )
            word += rng.choices(("", "s", "y", "ch", "x"), (86, 4, 6, 2, 2))[0]
            if 4 <= len(word) <= 13 and not word.endswith("ss") and word not in KEYWORDS and word not in NOVEL_WORDS:
                return word
        return rng.choice(WORDS)

    def identifier(self, rng: Random) -> str:
        """One word, two joined by ``_``, or rarely three."""
        style = rng.random()
        if style < 0.6:
            return self.word(rng)
        return self.word(rng) + ("_" if style < 0.95 else "_of_") + self.word(rng)

    def text(self, rng: Random, is_name: bool) -> str:
        """A value of a text column."""
        style = rng.random()
        if is_name:
            if style < 0.55:
                return _name(rng, "person")
            if style < 0.7:
                return _name(rng, rng.choice(("first", "place", "firm", "title")))
            return self.word(rng).capitalize() + (" " + self.word(rng).capitalize() if style < 0.85 else "")
        if style < 0.4:
            return rng.choice(_CITIES + _COUNTRIES)
        if style < 0.65:
            return self.word(rng).capitalize()
        if style < 0.85:
            return self.word(rng)
        return self.word(rng) + " " + self.word(rng) if style < 0.93 else self.word(rng)[: rng.choice((1, 2))].upper()

    def _fields(self, rng: Random, table: str, key: str, level: int) -> list[Field]:
        fields: dict[str, Field] = {}

        def add(name: str, kind: str, pool=(), low=0.0, high=0.0, nullable=False) -> None:
            if name not in fields and name != key:
                fields[name] = Field(name, kind, tuple(pool), low, high, nullable)

        def texts(is_name: bool, size: int) -> list[str]:
            return _unique(rng, size, lambda: self.text(rng, is_name))

        name = (
            rng.choice(_NAMES)
            if rng.random() < 0.5
            else f"{table}_name"
            if rng.random() < 0.5
            else self.identifier(rng)
        )
        add(name, "name", ["made", *texts(True, 14)])
        for _ in range(rng.choice((1, 1, 2)) if level else 1):
            column = rng.choice(_CATEGORIES) if rng.random() < 0.25 else self.identifier(rng)
            add(column, "category", texts(False, rng.randint(4, 6)), nullable=rng.random() < 0.1)
        for _ in range(rng.choice((1, 1, 2))):
            column = rng.choice(_QUANTITIES) if rng.random() < 0.25 else self.identifier(rng)
            high = rng.choice((10, 50, 60, 100, 500, 1000, 5000, 9900, 90000))
            if rng.random() < 0.15:
                add(column, "real", (), 1.0, rng.choice((5.0, 50.0)), rng.random() < 0.15)
            else:
                add(column, "integer", (), max(1, high // 10), high, rng.random() < 0.15)
        if rng.random() < 0.25:
            add(rng.choice(_YEARS) if rng.random() < 0.5 else self.word(rng) + "_year", "year", (), 1950, 2023)
        if level and rng.random() < 0.2:
            add(self.word(rng) + "_date" if rng.random() < 0.7 else "date_of_" + self.word(rng), "date")
        body = list(fields.values())
        rng.shuffle(body)
        return [Field(key, "id"), *body]

    def domain(self, rng: Random, level: int) -> Domain:
        """A schema of 1-2 tables at level 0, 1-3 at level 1 and 2-4 at level 2, filled with ten rows a table."""
        while True:
            count = rng.choice(((1, 1, 2), (1, 2, 2, 3), (2, 2, 3, 3, 4))[level])
            names = _unique(rng, count, lambda: self.identifier(rng) if rng.random() < 0.35 else self.word(rng))
            if len(set(names)) == count and sum(map(len, names)) <= 45:
                break
        domain = Domain("made_up", {})
        style = rng.random()
        for i, table in enumerate(names):
            key = "id" if style < 0.12 else f"{table}_code" if style > 0.88 else f"{table}_id"
            fields = self._fields(rng, table, key, level)
            link = i >= 2 and i == count - 1 and rng.random() < 0.5
            if link:
                fields = rng.sample(fields[1:], rng.randint(0, 2))
                if rng.random() < 0.5:
                    fields.insert(0, Field(key, "id"))
            for ref in rng.sample(names[:i], 2 if link else 1) if i else []:
                target = domain.primary(ref)
                if target:
                    column = f"{ref}_id" if target == "id" else target
                    fields.insert(rng.randint(min(1, len(fields)), len(fields)), Field(column, "key", ref=ref))
            domain.tables[table] = [f for f in fields if f.name not in names or f.kind in ("id", "key")]
        return fill(domain, rng, 10)
