from collections.abc import Mapping, Sequence

from orchestrator.sandbox.image_leftovers import HeldImage, Leftover, leftovers

OURS = {"rlm.source": "0" * 64}


def held(image_id: str, *names: str, labels: Mapping[str, str] | None = None) -> HeldImage:
    return HeldImage(image_id=image_id, names=names, labels=OURS if labels is None else labels, size_bytes=9)


def gone(*images: HeldImage, used: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """What goes, and under which names; `present` and `rlm-sandbox-base:present` are kept."""
    found = leftovers(images, used=set(used), kept_ids={"present"}, kept_names={"rlm-sandbox-base:present"})
    return [(leftover.image_id, list(leftover.names)) for leftover in found]


def test_the_image_of_other_sources_goes_and_the_present_one_stays() -> None:
    present = held("present", "rlm-sandbox:aaa", "rlm-sandbox:latest")
    assert gone(present, held("old", "rlm-sandbox:bbb")) == [("old", ["rlm-sandbox:bbb"])]


def test_an_image_that_a_container_was_made_of_stays() -> None:
    assert gone(held("old", "rlm-sandbox:bbb"), held("nameless"), used=["old", "nameless"]) == []


def test_bases_of_other_recipes_go_by_their_name_because_they_bear_no_label() -> None:
    bases = (
        held("old-base", "rlm-sandbox-base:old", "python:3.11-slim-bookworm", labels={}),
        held("base", "rlm-sandbox-base:present", labels={}),
    )
    assert gone(*bases) == [("old-base", ["rlm-sandbox-base:old"])]


def test_stages_and_replaced_images_go_when_no_name_is_left() -> None:
    images = (
        held("stage", labels={"rlm.image": "stage"}),
        held("orchestrator-before", labels={"rlm.image": "orchestrator"}),
        held("orchestrator", "rlm-orchestrator:latest", labels={"rlm.image": "orchestrator"}),
        held("replaced"),
    )
    assert [image_id for image_id, _ in gone(*images)] == ["stage", "orchestrator-before", "replaced"]


def test_images_of_others_stay_whatever_they_are_called() -> None:
    others = (
        held("postgres", "postgres:17", labels={}),
        held("nameless", labels={}),
        held("not-a-build-of-ours", "rlm-sandbox:mine", labels={}),
        held("alike", "rlm-sandbox-bases:x", labels={}),
        held("elsewhere", "registry.example:5000/rlm-sandbox:bbb"),
    )
    assert gone(*others) == []


def test_a_name_that_somebody_gave_an_old_image_of_ours_is_not_taken_away() -> None:
    assert gone(held("old", "rlm-sandbox:bbb", "mine:1")) == [("old", ["rlm-sandbox:bbb"])]


def test_a_leftover_is_told_by_its_names_or_else_by_its_id() -> None:
    assert Leftover(image_id="sha256:0", names=("a:1", "b:2"), size_bytes=1).name == "a:1, b:2"
    assert Leftover(image_id="sha256:" + "0" * 64, names=(), size_bytes=1).name == "0" * 12
