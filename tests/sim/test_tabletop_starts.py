"""What is random about a start, and the words of the instructions."""

import re

import numpy as np
import pytest
import torch

from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.instructions import COLORS, MAX_WORDS, TEMPLATES, WORD_IDS, encode, word_id
from embodied_rl.envs.tabletop.layout import (
    AREA,
    GOAL_AREA,
    GOAL_CLEARANCE,
    GOAL_DISTANCE,
    SEPARATION,
    YAW,
    draw_starts,
)
from embodied_rl.envs.tabletop.scene import HALF_SIZE, HIDDEN, HOME, SHAPES, build_scene
from embodied_rl.envs.tabletop.tasks import TASKS
from embodied_rl.seeding import start_seed, start_seeds


@pytest.fixture(scope="module")
def scene():
    return build_scene()


def draw(scene, task, split="train", count=200):
    seeds = [start_seed(11, split, 0, i) for i in range(count)]
    return draw_starts(scene, [TASKS[task]] * count, seeds)


def places(scene, starts):
    return np.stack([starts.qpos[:, q : q + 3] for q in scene.objects_qpos], axis=1)


def test_starts_keep_their_ranges_and_distances(scene):
    starts = draw(scene, "push", count=500)
    where = places(scene, starts)
    assert np.array_equal(where[:, :, 2], np.broadcast_to(HALF_SIZE[:, 2], (500, 3)))
    assert (where[:, :, :2] >= AREA[0]).all() and (where[:, :, :2] <= AREA[1]).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(where[:, i] - where[:, j], axis=1).min() > SEPARATION - 0.001
    goal = starts.goal[:, :2]
    assert (goal >= GOAL_AREA[0]).all() and (goal <= GOAL_AREA[1]).all()
    away = np.linalg.norm(where[:, :, :2] - goal[:, None], axis=2)
    meant = np.arange(3) == starts.a[:, None]
    assert (away[meant] >= GOAL_DISTANCE[0]).all() and (away[meant] <= GOAL_DISTANCE[1]).all()
    assert (away[~meant] >= GOAL_CLEARANCE).all()
    yaw = np.stack([2 * np.arctan2(starts.qpos[:, q + 6], starts.qpos[:, q + 3]) for q in scene.objects_qpos], axis=1)
    assert np.abs(yaw).max() <= YAW + 1e-9 and np.abs(yaw).max() > 0.9 * YAW
    joints = starts.qpos[:, scene.arm_qpos] - HOME
    assert 0.03 < np.abs(joints).max() <= 0.04


def test_everything_that_should_vary_does(scene):
    starts = draw(scene, "place", count=500)
    assert set(starts.a) == set(starts.b) == {0, 1, 2} and (starts.a != starts.b).all()
    assert set(starts.relation) == {0, 1}
    assert {tuple(row) for row in starts.colors} > {(0, 1, 2), (5, 4, 3)}
    assert all(len(set(row)) == 3 for row in starts.colors)
    assert np.bincount(starts.a).min() > 120 and np.bincount(starts.colors.ravel()).min() > 180


def test_only_tasks_with_a_marked_goal_show_one(scene):
    for name, task in TASKS.items():
        goal = draw(scene, name, count=3).goal
        assert (goal[:, 2] > 0).all() if task.marked_goal else (goal == HIDDEN).all()


def test_the_drawer_starts_where_the_task_says(scene):
    for name, task in TASKS.items():
        opening = draw(scene, name).qpos[:, scene.drawer_qpos]
        assert task.drawer[0] <= opening.min() and opening.max() <= task.drawer[1]
        assert np.ptp(opening) > 0.8 * (task.drawer[1] - task.drawer[0])


def test_a_start_does_not_depend_on_what_is_drawn_beside_it(scene):
    seeds = [start_seed(5, "train", 0, i) for i in range(37)]
    tasks = [list(TASKS.values())[i % 7] for i in range(37)]
    together = draw_starts(scene, tasks, seeds)
    for i in (0, 5, 36):
        alone = draw_starts(scene, [tasks[i]], [seeds[i]])
        assert np.array_equal(alone.qpos[0], together.qpos[i]) and np.array_equal(alone.goal[0], together.goal[i])
        assert alone.texts[0] == together.texts[i] and np.array_equal(alone.colors[0], together.colors[i])


# ---- words ------------------------------------------------------------------------------------------------------


def words_of(texts):
    return set(re.findall(r"[a-z]+", re.sub(r"\{.\}", " ", " ".join(texts))))


def test_every_task_has_wordings_for_training_and_others_for_evaluation():
    assert {wording for task in TASKS.values() for wording in task.wordings} == set(TEMPLATES)
    for templates in TEMPLATES.values():
        assert len(templates["train"]) >= 4 and len(templates["eval"]) >= 3
        assert not set(templates["train"]) & set(templates["eval"])


def test_training_and_evaluation_sentences_never_meet(scene):
    for task in TASKS:
        train, evaluation = draw(scene, task).texts, draw(scene, task, "eval").texts
        assert not set(train) & set(evaluation)


def test_the_sentence_is_all_that_differs_between_the_wordings_of_an_evaluation_start(scene):
    seeds = [start_seed(11, "eval", 0, i) for i in range(100)]
    for task in TASKS.values():
        heldout = draw_starts(scene, [task] * 100, seeds)
        training = draw_starts(scene, [task] * 100, seeds, evaluation_sentences="training")
        for name in ("qpos", "a", "b", "b_start", "relation", "goal", "colors"):
            assert np.array_equal(getattr(heldout, name), getattr(training, name)), name
        for wording, source in (("eval", heldout), ("train", training)):
            patterns = [re.sub(r"\\\{.\\\}", "[a-z ]+", re.escape(t)) for w in task.wordings for t in TEMPLATES[w][wording]]
            assert all(any(re.fullmatch(p, text) for p in patterns) for text in source.texts)
        assert not set(heldout.texts) & set(training.texts)
        # Both name the objects with the same words: only the sentence around them is another.
        names = [[re.findall(rf"{'|'.join(COLORS + SHAPES)}", text) for text in s.texts] for s in (heldout, training)]
        assert names[0] == names[1]


def test_training_starts_do_not_know_how_evaluation_is_worded(scene):
    seeds = [start_seed(11, "train", 0, i) for i in range(50)]
    tasks = [TASKS["push"]] * 50
    assert draw_starts(scene, tasks, seeds).texts == draw_starts(scene, tasks, seeds, evaluation_sentences="training").texts


def test_evaluation_uses_only_words_that_its_task_has_in_training():
    for templates in TEMPLATES.values():
        assert words_of(templates["eval"]) <= words_of(templates["train"])


def test_no_two_words_share_an_id():
    words = words_of(t for kind in TEMPLATES.values() for texts in kind.values() for t in texts)
    words |= {*COLORS, *SHAPES, "object"}
    ids = {word_id(word) for word in words}
    assert len(ids) == len(words) and min(ids) >= 1 and max(ids) < WORD_IDS


def test_no_instruction_is_cut(scene):
    longest = 0
    for task in TASKS:
        for split in ("train", "eval"):
            texts = draw(scene, task, split).texts
            longest = max(longest, *(len(text.split()) for text in texts))
    assert 10 <= longest <= MAX_WORDS


def test_encoding_is_stable_and_ignores_case_and_punctuation():
    ids = encode("Lift the RED cube!")
    assert ids == encode("lift the red cube") and len(ids) == MAX_WORDS
    assert ids[4:] == (0,) * (MAX_WORDS - 4) and all(ids[:4])
    # Checkpoints depend on these numbers.
    assert ids[:4] == IDS_OF_LIFT_THE_RED_CUBE


IDS_OF_LIFT_THE_RED_CUBE = (285, 34, 423, 1015)


def test_the_instruction_names_the_object_meant_and_no_other(scene):
    starts = draw(scene, "stack", count=300)
    for i, text in enumerate(starts.texts):
        named = []
        for slot, shape in enumerate(SHAPES):
            color = COLORS[starts.colors[i, slot]]
            found = [text.find(word) for word in (color, shape) if word in text]
            if found:
                named.append((min(found), slot))
        order = [slot for _, slot in sorted(named)]
        assert order == [starts.a[i], starts.b[i]], text


def test_objects_are_named_by_colour_by_shape_and_by_both(scene):
    texts = draw(scene, "lift", count=300).texts
    color, shape = "|".join(COLORS), "|".join(SHAPES)
    assert any(re.search(f"({color}) object", t) for t in texts)
    assert any(re.search(f"({color}) ({shape})", t) for t in texts)
    assert any(re.search(f"the ({shape})", t) for t in texts)


@pytest.mark.parametrize(("names", "told"), [(("color",), "red object"), (("shape",), "cube"), (("both",), "red cube")])
def test_objects_are_named_as_asked_for(scene, names, told):
    seeds = [start_seed(11, "train", 0, i) for i in range(60)]
    all_names = draw_starts(scene, [TASKS["lift"]] * 60, seeds)
    starts = draw_starts(scene, [TASKS["lift"]] * 60, seeds, names=names)
    assert np.array_equal(all_names.qpos, starts.qpos) and np.array_equal(all_names.colors, starts.colors)
    for text, a, colors in zip(starts.texts, starts.a, starts.colors, strict=True):
        color, shape = COLORS[colors[a]], SHAPES[a]
        assert told.replace("red", color).replace("cube", shape) in text
        assert ("object" in text, color in text, shape in text) == ("color" in names, "shape" not in names, "color" not in names)


def test_other_words_ask_for_the_same_and_only_in_training():
    config = Config(tasks=["push", "place"], rephrase=True, threads=1)
    for split in ("train", "eval"):
        envs = [build(config, num_envs=4, device=torch.device("cpu"), split=split, seed=0) for _ in range(2)]
        seeds, tasks = start_seeds(3, split, torch.zeros(4, dtype=torch.int64), torch.arange(4)), torch.arange(4) % 2
        said = []
        for env in envs:
            env.reset(torch.ones(4, dtype=torch.bool), seeds, tasks)
        first, start = envs[0].instructions(), envs[0].episode
        colors, shapes = start.colors[torch.arange(4), start.a].tolist(), start.a.tolist()
        for t in range(12):
            active = torch.tensor([True, True, True, t < 6])
            shown = [env.step(torch.zeros(4, 7), active).obs["instruction"] for env in envs]
            texts = envs[0].instructions()
            assert torch.equal(*shown) and texts == envs[1].instructions(), "the same starts, the same words"
            assert torch.equal(shown[0], torch.tensor([encode(text) for text in texts]))
            said.append(texts)
        for copy in range(4):
            mine = {texts[copy] for texts in said}
            if split == "eval":
                assert mine == {first[copy]}
                continue
            assert len(mine) > 4
            assert copy != 3 or len({texts[copy] for texts in said[5:]}) == 1, "it has not moved since"
            wording = envs[0]._tasks[copy % 2].wordings[int(start.relation[copy])]
            nouns = (f"{COLORS[colors[copy]]} object", SHAPES[shapes[copy]], f"{COLORS[colors[copy]]} {SHAPES[shapes[copy]]}")
            heads = [t.split("{b}")[0].format(a=noun) for t in TEMPLATES[wording]["train"] for noun in nouns]
            assert all(any(text.startswith(head) for head in heads) for text in mine)
        for env in envs:
            env.close()
