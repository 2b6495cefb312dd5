"""A demonstration repeated by guesswork: nothing is looked at, what is found is found again, and only success tells."""

import json

import pytest
import torch
from torch.testing import assert_close

from embodied_rl import blind
from embodied_rl.blind import Guesses
from embodied_rl.config import load_component
from embodied_rl.demo_check import validate
from embodied_rl.demo_console import summary_table
from embodied_rl.demo_format import DemonstrationError
from embodied_rl.demo_starts import Shown
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.envs.tabletop import Config, build
from embodied_rl.envs.tabletop.blind import SHIFT, feels, things_at
from embodied_rl.envs.tabletop.replay import Replay
from embodied_rl.errors import CapabilityError
from embodied_rl.record_demos import collect_demonstrations
from embodied_rl.seeding import start_seeds
from tests.sim.conftest import SETTINGS, TASKS

COPIES = 24
EXACTLY = [[]] * 150
"""Nothing beside."""


def made(copies=COPIES, **settings):
    config = Config(tasks=list(TASKS), reward="sparse", max_steps=60, threads=1, **settings)
    return build(config, num_envs=copies, device=torch.device("cpu"), split="train", seed=0)


def starts(n, stream):
    return start_seeds(3, "train", torch.full((n,), stream), torch.arange(n))


@pytest.fixture(scope="module")
def shown(demos):
    return Shown.read(demos, "tabletop", TASKS)


@pytest.fixture(scope="module")
def table():
    env = made()
    yield env
    env.close()


def begin(env, shown, seeds, elsewhere, blindfold=False):
    """A replay that takes starts [B] for others [B]; blindfold, it is told nonsense of objects and goal from here on."""
    everyone = torch.ones(env.spec.num_envs, dtype=torch.bool)
    again = env.replay(shown.seeds, shown.tasks, shown.actions)
    if blindfold:
        told = {name: torch.full_like(x, torch.nan) for name, x in again._look().items()}
        again._look = lambda: told | {"hand": env.controller.position.clone().float()}
    env.reset(everyone, seeds, torch.arange(len(seeds)) % 3)
    again.suppose(everyone, elsewhere, [[]] * len(seeds))
    again.reset(everyone)
    return again


def test_what_it_supposes_is_what_it_would_see_at_the_other_start(table, shown):
    seeds, elsewhere = starts(COPIES, 0), starts(COPIES, 1)
    again = begin(table, shown, seeds, elsewhere)
    supposed = {name: again._where()[name].clone() for name in ("object", "half", "yaw", "goal")}
    hand = again._where()["hand"].clone()
    assert torch.equal(hand, again._look()["hand"]), "where the hand is, it knows"
    table.reset(torch.ones(COPIES, dtype=torch.bool), elsewhere, torch.arange(COPIES) % 3)
    for name, x in supposed.items():
        assert_close(x, again._look()[name], atol=1e-6, rtol=0, msg=name)


def test_nothing_about_the_objects_is_looked_at(table, shown, monkeypatch):
    seeds, elsewhere, everyone = starts(COPIES, 0), starts(COPIES, 1), torch.ones(COPIES, dtype=torch.bool)
    view = table.view

    def play(blindfold):
        again, played = begin(table, shown, seeds, elsewhere, blindfold), []
        clumsy = again.clumsy(everyone, seed=0)
        clumsy.reset(everyone)
        for _ in range(40):
            if blindfold:
                monkeypatch.setattr(table, "view", lambda: pytest.fail("it looked"))
            played.append(torch.where(clumsy.errs[:, None], clumsy.act(), again.act()))
            monkeypatch.setattr(table, "view", view)  # judging success looks, and is no part of the replay
            table.step(played[-1])
        return torch.stack(played)

    assert torch.equal(play(blindfold=False), play(blindfold=True))


def test_a_right_guess_solves_it_and_a_wrong_one_seldom(table, shown):
    again = table.replay(shown.seeds, shown.tasks, shown.actions)
    seeds, tasks = starts(150, 0), torch.arange(150) % 3
    assert float(again.guess(seeds, tasks, seeds, EXACTLY).float().mean()) > 0.9
    assert float(again.guess(seeds, tasks, starts(150, 1), EXACTLY).float().mean()) < 0.1


def test_a_guess_that_has_closed_on_nothing_is_given_up(table, shown):
    """Its path would go on, and might push the object to its goal all the same."""
    again = begin(table, shown, starts(COPIES, 0), starts(COPIES, 1))
    again._trying, held, given_up = True, torch.zeros(COPIES, dtype=torch.bool), torch.zeros(COPIES, dtype=torch.bool)
    for _ in range(60):
        table.step(again.act())
        held |= feels(table)
        given_up |= again.over & (again._step < again._length[again._which] - 1)
    grasping = torch.arange(COPIES) % 3 > 0
    assert given_up[grasping & ~held].all() and not given_up[~grasping].any() and int((grasping & ~held).sum()) > 8


def test_the_middle_of_what_succeeds_around_a_right_guess_is_nearer(table, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(blind, "ROUND", 400)
    (tmp_path / "meta").mkdir()
    guesses, again = Guesses(tmp_path, TASKS, 0), table.replay(shown.seeds, shown.tasks, shown.actions)
    numbers = 3 * torch.arange(8)[:, None] + torch.tensor([0, 2])  # reach and lift, eight each
    seeds, elsewhere, beside = guesses.starts(numbers.flatten(), again)
    tasks = [0, 2] * 8
    assert all(0 < len(one) < blind.TRIES for one in beside)

    def places(seeds, beside):
        return things_at(table, seeds.tolist(), tasks, beside)["object"][:, :2]

    truth = places(seeds, EXACTLY[:16])
    far = (places(elsewhere, EXACTLY[:16]) - truth).norm(dim=1).median()
    near = (places(elsewhere, beside) - truth).norm(dim=1).median()
    assert 0.01 < far < 0.03 and near < 0.7 * far


def test_small_shifts_are_of_the_object_and_of_the_goal_and_their_mean_is_taken(table):
    seeds, tasks = starts(2, 0).tolist(), [1, 1]
    plain, one, other, both = (things_at(table, seeds, tasks, [[], list(x)]) for x in ((), (5,), (6,), (5, 6)))
    for name in ("object", "goal", "yaw", "half"):
        assert torch.equal(plain[name][0], one[name][0]), "the first has no shift"
        assert_close(both[name][1], (one[name][1] + other[name][1]) / 2)
    for name in ("object", "goal"):
        moved = (one[name] - plain[name])[1]
        assert moved[:2].abs().min() > 1e-4 and moved[2] == 0
    many = torch.stack([things_at(table, seeds[:1], [1], [[i]])["object"][0] for i in range(200)])
    assert_close(many[:, :2].std(dim=0), torch.full((2,), SHIFT), atol=0.004, rtol=0)


def test_what_a_guess_comes_to_does_not_depend_on_what_is_tried_beside_it(shown):
    seeds, tasks = starts(41, 0), torch.arange(41) % 3
    # Right ones and wrong ones, more than there are copies and not a multiple of them.
    elsewhere = torch.where(torch.arange(41) % 4 == 0, starts(41, 1), seeds)
    told = []
    for copies in (5, 64):
        env = made(copies)
        told.append(env.replay(shown.seeds, shown.tasks, shown.actions).guess(seeds, tasks, elsewhere, [[], [5]] * 20 + [[]]))
        env.close()
    assert torch.equal(told[0], told[1]) and 0 < int(told[0].sum()) < 41


def test_fingers_feel_that_they_hold_something(table, shown):
    seeds, held = starts(COPIES, 0), torch.zeros(COPIES, dtype=torch.bool)
    again = begin(table, shown, seeds, seeds)
    assert not feels(table).any(), "open fingers hold nothing"
    for _ in range(19):
        table.step(again.act())
        held |= table.view().held
        assert not (table.view().held & ~feels(table)).any()
    assert held.any()
    closed = torch.zeros(COPIES, 7)
    closed[:, 6] = -1
    begin(table, shown, seeds, seeds)
    for _ in range(10):
        table.step(closed)
        assert not feels(table).any(), "nor do fingers that close on nothing"


def test_a_blind_hand_errs_until_it_has_found_out(table, shown):
    seeds, everyone = starts(COPIES, 0), torch.ones(COPIES, dtype=torch.bool)
    again = begin(table, shown, seeds, seeds)
    clumsy = again.clumsy(everyone, seed=0)
    clumsy.reset(everyone)
    grasping = torch.arange(COPIES) % 3 > 0
    missed, solved = torch.zeros(COPIES, dtype=torch.bool), torch.zeros(COPIES, dtype=torch.bool)
    for t in range(60):
        assert t > 8 or torch.equal(clumsy.errs, grasping)
        wanted, errs = again.act(), clumsy.errs
        solved |= table.step(torch.where(errs[:, None], clumsy.act(), wanted)).success
        missed |= errs & ~clumsy.errs & ~table.view().held
    assert not clumsy.errs.any() and float(missed[grasping].float().mean()) > 0.3
    assert float(solved[missed].float().mean()) > 0.3, "and mends it, where the object lies where it was"


def test_nothing_is_drawn_while_it_is_guessed(shown):
    env = made(6, observation="pictures", cameras=["table"], picture_size=16)
    again = env.replay(shown.seeds, shown.tasks, shown.actions)
    pictures, drawn = env._pictures, []
    look = pictures.look
    pictures.look = lambda *a: drawn.append(1) or look(*a)
    seeds = starts(12, 0)
    again.guess(seeds, torch.arange(12) % 3, seeds, EXACTLY)
    assert not drawn
    seen = env.reset(torch.ones(6, dtype=torch.bool), seeds[:6], torch.arange(6) % 3)
    assert drawn and seen["table"].float().std() > 0
    env.close()


@pytest.fixture
def quick(monkeypatch):
    """Guess a little at a time, and as if half of the guesses were right, so that a test can wait for it."""
    monkeypatch.setattr(blind, "ROUND", 8)
    monkeypatch.setattr(blind, "TRIES", 3)
    seeds = Guesses._seeds
    monkeypatch.setattr(
        Guesses, "_seeds", lambda self, stream, i: torch.where(i % 2 == 0, seeds(self, blind.STARTS, i), seeds(self, stream, i))
    )


def collect(folder, episodes, demos):
    env = load_component("env", "tabletop", SETTINGS)
    return collect_demonstrations(env, folder, episodes, replay=demos, blind=True, misses=0.5, show_misses=True, copies=6)


def test_a_blind_set_is_whole_says_what_it_is_and_goes_on_where_it_stopped(demos, tmp_path, quick):
    done = collect(tmp_path / "more", 9, demos)
    assert validate(tmp_path / "more") == []
    more = Demonstrations(tmp_path / "more")
    assert more.info["embodied_rl"]["made"]["blind"] is True and all(line.extra["success"] for line in more.lines)
    found = [json.loads(line) for line in (tmp_path / "more/meta/guesses.jsonl").read_text().splitlines()]
    assert [row["task"] for row in found] == list(TASKS)
    assert all(3 * a <= i < 3 * a + 3 for row in found for a, tries in zip(row["solved"], row["beside"], strict=False) for i in tries)
    assert all(len(row["beside"]) >= 3 for row in found) and any(row["beside"][0] for row in found)
    for k, line in enumerate(more.lines):
        number = line.extra["attempt"]
        attempt = found[k % 3]["solved"][number // 3]
        assert number % 3 == attempt % 3 == k % 3
        assert line.extra["seed"] == int(start_seeds(0, "train", torch.tensor([blind.STARTS]), torch.tensor([attempt])))
    cells = [str(cell) for column in summary_table(done).columns for cell in column.cells]
    assert "guesses at push" in cells
    collect(tmp_path / "first", 3, demos)
    collect(tmp_path / "first", 9, demos)
    (tmp_path / "first/meta/guesses.jsonl").unlink()
    collect(tmp_path / "first", 12, demos)
    again = Demonstrations(tmp_path / "first")
    for x, y in zip(more.load(cameras=()), again.load(cameras=()), strict=False):
        assert torch.equal(x.action, y.action), "interrupted or not, and found anew where the file was lost"


def test_a_task_that_no_guess_solves_is_told(demos, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(blind, "HOPELESS", 2)
    monkeypatch.setattr(Replay, "guess", lambda self, seeds, tasks, *told: tasks != 1)
    with pytest.raises(CapabilityError, match="none of 16 guesses solved task 'push': give it more time"):
        collect(tmp_path / "set", 3, demos)


def test_a_set_that_was_told_where_things_are_is_not_continued_blindly(demos, tmp_path, quick):
    collect_demonstrations(load_component("env", "tabletop", SETTINGS), tmp_path / "set", 3, replay=demos, misses=0.5, show_misses=True, copies=6)
    with pytest.raises(Exception, match="blind"):
        collect(tmp_path / "set", 6, demos)


def test_what_cannot_guess_is_told(demos, tmp_path, monkeypatch):
    env = load_component("env", "tabletop", SETTINGS)
    with pytest.raises(CapabilityError, match="--blind does nothing without demonstrations to repeat: set --replay"):
        collect_demonstrations(env, tmp_path / "set", 3, blind=True)
    monkeypatch.delattr(Replay, "suppose")
    with pytest.raises(CapabilityError, match=r"give it methods `guess\(\)` and `suppose\(\)`"):
        collect(tmp_path / "set", 3, demos)


@pytest.mark.parametrize("line", ['{"task": "push"}', '{"task": "open", "tried": 8, "solved": []}', '{"task": "push", "tried": 8, "solved": 3}', '{"task": "push", "tried": 8, "solved": [3]}'])
def test_a_damaged_file_of_guesses_is_told(tmp_path, line):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/guesses.jsonl").write_text(line + "\n")
    with pytest.raises(DemonstrationError, match=r"guesses\.jsonl: is damaged .*; delete it, and the guesses are made again"):
        Guesses(tmp_path, TASKS, 0)
