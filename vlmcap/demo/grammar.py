"""Korean captions that state every fact of a scene, with correct particles, in several phrasings."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

# Every value of every fact, with the phrases that state it. Any phrase of a value counts; the phrases of two values
# never overlap.
FACTS: dict[str, dict[str, list[str]]] = {
    # sea, hillside, city, riverside, palace, field
    "place": {name: [name] for name in ("바다", "산자락", "도심", "강변", "궁궐", "들판")},
    "time": {name: [name] for name in ("아침", "한낮", "해 질 녘", "한밤")},  # morning, noon, dusk, midnight
    "weather": {
        "맑음": ["맑은", "맑게", "맑고"],  # clear
        "흐림": ["흐린", "흐리고", "먹구름"],  # cloudy
        "비": ["비가", "빗줄기", "비 내리는"],  # rain
        "눈": ["눈이", "눈발", "눈 내리는"],  # snow
    },
    "object": {
        name: [name] for name in ("풍선", "방패연", "갈매기", "드론", "종이등")
    },  # balloon, kite, gull, drone, paper lantern
    "colour": {name: [name] for name in ("빨간", "파란", "노란", "하얀", "초록")},  # red, blue, yellow, white, green
    "direction": {
        "오른쪽": ["왼쪽에서 오른쪽으로", "왼쪽에서 나타나 오른쪽으로", "오른쪽을 향해"],  # to the right
        "왼쪽": ["오른쪽에서 왼쪽으로", "오른쪽에서 나타나 왼쪽으로", "왼쪽을 향해"],  # to the left
    },
    "camera": {
        "고정": ["카메라는 한자리에 멈춰", "고정된 카메라"],  # still
        "이동": ["카메라는 옆으로 훑으며", "옆으로 훑는 카메라"],  # pan
        "확대": ["카메라는 앞으로 다가가며", "앞으로 다가가는 카메라"],  # zoom
    },
}


@dataclass(frozen=True, slots=True)
class Scene:
    """The facts of one clip; each is a key of `FACTS[field]`."""

    place: str
    time: str
    weather: str
    object: str
    colour: str
    direction: str
    camera: str


def draw_scene(rng: random.Random) -> Scene:
    """Draws every fact of a scene uniformly and independently, so that none can be guessed from another."""
    return Scene(**{field.name: rng.choice(list(FACTS[field.name])) for field in fields(Scene)})


def with_particle(noun: str, particles: str) -> str:
    """Returns `noun` with the right form of a particle pair such as "이/가": the first form follows a final consonant.

    "으로/로" counts a final ㄹ as a vowel, as Korean does.

    Raises:
        ValueError: The noun does not end in a Hangul syllable.
    """
    closed, opened = particles.split("/")
    # Unicode orders syllables by initial, medial and final: 0xAC00 + (initial * 21 + medial) * 28 + final.
    code = ord(noun[-1]) - 0xAC00
    if not 0 <= code < 11172:  # 19 initials * 21 medials * 28 finals
        raise ValueError(f"'{noun}' does not end in a Hangul syllable, so its particle is undefined")
    final = code % 28  # 0 for none
    rieul = 8  # ㄹ takes 로: 물로, but 산으로
    return noun + (closed if final and not (closed == "으로" and final == rieul) else opened)


_ADNOMINAL = {"맑음": "맑은", "흐림": "흐린", "비": "비 내리는", "눈": "눈 내리는"}
_PREDICATE = {
    "맑음": "하늘이 맑게 개어 있다",
    "흐림": "하늘에 먹구름이 끼어 있다",
    "비": "비가 내리고 있다",
    "눈": "눈이 내리고 있다",
}
_CLAUSE = {"맑음": "하늘은 맑고", "흐림": "하늘은 흐리고", "비": "빗줄기가 떨어지고", "눈": "눈발이 흩날리고"}
_CAMERA_CLAUSE = {
    "고정": "카메라는 한자리에 멈춰 있다.",
    "이동": "카메라는 옆으로 훑으며 움직인다.",
    "확대": "카메라는 앞으로 다가가며 움직인다.",
}
_CAMERA_NOUN = {"고정": "고정된 카메라", "이동": "옆으로 훑는 카메라", "확대": "앞으로 다가가는 카메라"}
_MOOD = {
    "맑음": "장면 전체가 또렷하고 상쾌하다.",
    "흐림": "장면 전체가 차분하고 무겁다.",
    "비": "장면 전체가 촉촉하게 젖어 있다.",
    "눈": "장면 전체가 포근하고 고요하다.",
}


def _setting(scene: Scene, rng: random.Random) -> str:
    """Returns the sentence about place, time and weather."""
    weather = scene.weather
    return rng.choice(
        (
            f"{_ADNOMINAL[weather]} {scene.time}의 {with_particle(scene.place, '이/가')} 화면에 펼쳐진다.",
            f"{scene.time}의 {with_particle(scene.place, '을/를')} 담은 장면으로 {_PREDICATE[weather]}.",
            f"{_CLAUSE[weather]} {scene.time}의 {with_particle(scene.place, '이/가')} 보인다.",
        )
    )


def _motion(scene: Scene, rng: random.Random) -> str:
    """Returns the sentence about the object, its colour and its direction."""
    start, end = ("왼쪽", "오른쪽") if scene.direction == "오른쪽" else ("오른쪽", "왼쪽")
    thing = f"{scene.colour} {scene.object}"
    return rng.choice(
        (
            f"{with_particle(thing, '이/가')} {start}에서 {end}으로 천천히 날아간다.",
            f"{thing} 하나가 {start}에서 나타나 {end}으로 지나간다.",
            f"그 위로 {with_particle(thing, '은/는')} {end}을 향해 움직인다.",
        )
    )


def describe(scene: Scene, rng: random.Random) -> str:
    """Returns a caption of two to four sentences that states all facts of `scene`; `rng` picks the phrasing."""
    setting, motion = _setting(scene, rng), _motion(scene, rng)
    # Shares of the phrasings: 20 % begin with one camera sentence, 20 % with another, 60 % end with the camera.
    if rng.random() < 0.4:
        sentences = [f"{with_particle(_CAMERA_NOUN[scene.camera], '이/가')} 담은 영상이다.", setting, motion]
        if rng.random() < 0.5:
            sentences = [f"{with_particle(_CAMERA_NOUN[scene.camera], '은/는')} 이 장면을 비춘다. " + setting, motion]
    else:
        sentences = [setting, motion, _CAMERA_CLAUSE[scene.camera]]
    if rng.random() < 0.25:
        sentences.append(_MOOD[scene.weather])
    return " ".join(sentences)
