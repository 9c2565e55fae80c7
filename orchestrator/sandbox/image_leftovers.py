"""Images that former versions and builds have left in the engine: which are ours, and removing those.

Rules.

1. Ours is what bears a label of our builds. A base bears none, since it is an imported archive or a pulled
   one: there our repository's name decides, and nothing but that name is taken away.
2. What is kept stays: the image of the present sources, one that the settings pin, the present recipe's base.
3. What any container was made of stays, whoever's container it is, stopped ones included.
4. Names that others gave an image stay, and it with them. Nothing is forced.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import docker
from docker.errors import APIError, ImageNotFound

from orchestrator.errors import EngineError
from orchestrator.sandbox.image import BASE_REPOSITORY, REPOSITORY, SOURCE_LABEL, engine_errors

PART_LABEL = "rlm.image"
"""On stages of our builds, and on the orchestrator's own image: left without a name, they are left over."""
_NO_NAME = "<none>:<none>"
_CONFLICT = 409
"""The engine's word for an image in use, or with others built on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldImage:
    """An image as the engine lists it."""

    image_id: str
    names: Sequence[str]
    """Repository and tag."""
    labels: Mapping[str, str]
    size_bytes: int
    """With layers that it shares with others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """An image to remove."""

    image_id: str
    names: Sequence[str]
    """The names to take away, after which the engine removes what has none; empty for one without a name."""
    size_bytes: int

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(self.names) or self.image_id.removeprefix("sha256:")[:12]


def leftovers(
    images: Iterable[HeldImage], *, used: Set[str], kept_ids: Set[str], kept_names: Set[str]
) -> list[Leftover]:
    """Those that go, in the order given.

    Args:
        images: All of the engine's.
        used: Ids of images that containers were made of.
        kept_ids: Ids of images that stay.
        kept_names: Names that stay.
    """
    gone = []
    for image in images:
        if image.image_id in used or image.image_id in kept_ids:
            continue
        ours = tuple(name for name in image.names if _is_ours(name, image.labels) and name not in kept_names)
        is_nameless_of_ours = not image.names and (PART_LABEL in image.labels or SOURCE_LABEL in image.labels)
        if ours or is_nameless_of_ours:
            gone.append(Leftover(image_id=image.image_id, names=ours, size_bytes=image.size_bytes))
    return gone


def _is_ours(name: str, labels: Mapping[str, str]) -> bool:
    repository = name.rpartition(":")[0]
    return repository == BASE_REPOSITORY or (repository == REPOSITORY and SOURCE_LABEL in labels)


def find(client: docker.DockerClient, *, kept_ids: Set[str], kept_names: Set[str]) -> list[Leftover]:
    """What former versions and builds have left in the engine, by name, what has none last.

    Raises:
        EngineError: The engine does not answer.
    """
    with engine_errors("list images and containers"):
        # Images first: a container made meanwhile keeps its image, one that ended meanwhile costs a round.
        images = client.api.images()
        used = {container["ImageID"] for container in client.api.containers(all=True)}
    held = [
        HeldImage(
            image_id=image["Id"],
            names=tuple(name for name in image["RepoTags"] or () if name != _NO_NAME),
            labels=image["Labels"] or {},
            size_bytes=image["Size"],
        )
        for image in images
    ]
    found = leftovers(held, used=used, kept_ids=kept_ids, kept_names=kept_names)
    # The engine lists images that were made in the same second in any order.
    return sorted(found, key=lambda one: (not one.names, one.name))


def remove(client: docker.DockerClient, leftover: Leftover) -> str:
    """Removes it; an empty string, or why the engine kept it.

    Raises:
        EngineError: The engine does not answer.
    """
    for name in leftover.names or (leftover.image_id,):
        try:
            with engine_errors(f"remove the image {name}"):
                client.api.remove_image(name)
        except EngineError as error:
            cause = error.__cause__
            if isinstance(cause, ImageNotFound):
                continue
            if isinstance(cause, APIError) and cause.status_code == _CONFLICT:
                return "something is made of it"
            raise
    return ""
