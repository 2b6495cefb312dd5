"""Every mistake in a recipe that has a name: what is written, and exactly what is said (exit code 2, no traceback)."""

import sys

import pytest

from embodied_rl import registry
from embodied_rl.cli import main

# (appended to toy.yaml as the file my.yaml, overrides, the whole message after "error: ")
ROWS = {
    "unknown key": ("sed: 1", [], "my.yaml:2: sed: unknown key; did you mean 'seed'?"),
    "unknown key deep down": (
        "algorithm:\n  loss:\n    value:\n      coeff: 1",
        [],
        "my.yaml:5: algorithm.loss.value.coeff: unknown key; did you mean 'coef'?",
    ),
    "unknown key on the command line": (
        "",
        ["policy.hiden=[8]"],
        "command line: policy.hiden=[8]: policy.hiden: unknown key; did you mean 'hidden'?",
    ),
    "dotted key in a file": (
        "train.env_steps: 5",
        [],
        "my.yaml:2: train.env_steps: unknown key; a dotted key works only on the command line, nest it here",
    ),
    "text for an integer": ("seed: one", [], "my.yaml:2: seed: expected a valid integer, got 'one'"),
    "quoted number": ('seed: "1"', [], "my.yaml:2: seed: expected a valid integer, got '1'"),
    "fraction for an integer": (
        "",
        ["collect.copies=2.5"],
        "command line: collect.copies=2.5: collect.copies: expected a valid integer, got 2.5",
    ),
    "1e6 for an integer": (
        "",
        ["train.env_steps=1e6"],
        "command line: train.env_steps=1e6: train.env_steps: expected a valid integer, got 1000000.0; write 1000000",
    ),
    "underscores": (
        "train:\n  env_steps: 1_000",
        [],
        "my.yaml:3: train.env_steps: expected a valid integer, got '1_000'; write 1000",
    ),
    "yes for true": (
        "evaluate: {greedy: yes}",
        [],
        "my.yaml:2: evaluate.greedy: expected a valid boolean, got 'yes'; write true",
    ),
    "one number for a list": (
        "policy: {hidden: 64}",
        [],
        "my.yaml:2: policy.hidden: expected a list, got 64",
    ),
    "wrong type inside a list": (
        "policy:\n  hidden:\n    - 8\n    - wide",
        [],
        "my.yaml:5: policy.hidden[1]: expected a valid integer, got 'wide'",
    ),
    "a section where a number belongs": ("seed: {a: 1}", [], "my.yaml:2: seed: expected a valid integer, got a section"),
    "null where a number belongs": ("seed: null", [], "my.yaml:2: seed: expected a valid integer, got null"),
    "zero copies": (
        "",
        ["collect.copies=0"],
        "command line: collect.copies=0: collect.copies: expected greater than or equal to 1, got 0",
    ),
    "learning rate 0": (
        "algorithm: {update: {lr: 0}}",
        [],
        "my.yaml:2: algorithm.update.lr: expected greater than 0, got 0",
    ),
    "infinite learning rate is no number to divide by": (
        "train: {target_success: .inf}",
        [],
        "my.yaml:2: train.target_success: expected less than or equal to 1, got Infinity",
    ),
    "not a number": ("algorithm: {update: {lr: .nan}}", [], "my.yaml:2: .nan: no setting can be 'not a number'; write null or a number"),
    "leading zero": ("seed: 010", [], "my.yaml:2: 010: a leading zero is octal for some readers; write 10, or quote it for text"),
    "not one of the choices": (
        "collect: {mode: steam}",
        [],
        "my.yaml:2: collect.mode: expected 'stream' or 'episodes', got 'steam'",
    ),
    "a folder in the name": (
        "",
        ["name=../x"],
        "command line: name=../x: name: expected text of the pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got '../x'",
    ),
    "duplicate key": ("seed: 1\nseed: 2", [], "my.yaml:3: key 'seed' was given before at my.yaml:2; keep one of them"),
    "a number where text belongs": ("device: 0", [], "my.yaml:2: device: expected text, got 0"),
    "a name where a section belongs": (
        "collect: fast",
        [],
        "my.yaml:2: collect: expected a section, got 'fast'",
    ),
    "override given twice": ("", ["seed=1", "seed=2"], "command line: seed=2: seed was given before as seed=1; keep one"),
    "override without a value": ("", ["seed="], "command line: seed=: no value after '='; write seed=null to unset it"),
    "override that is none": ("", ["fast"], "command line: fast: expected a.b=c, for example train.env_steps=100000"),
    "broken YAML": (
        "seed: [1",
        [],
        "my.yaml:3: not valid YAML while parsing a flow sequence: expected ',' or ']', but got '<stream end>'",
    ),
    "a tab": ("\tseed: 1", [], "my.yaml:2: not valid YAML while scanning for the next token: found character '\\t' that cannot start any token"),
    "merge key": ("collect: {<<: {copies: 1}}", [], "my.yaml:2: merge keys (<<) are not used in recipes; use extends"),
    "env that does not exist": (
        "",
        ["env.type=tabeltop"],
        "command line: env.type=tabeltop: env.type: env 'tabeltop' does not exist; did you mean 'tabletop'?",
    ),
    "policy that does not exist": (
        "policy: {type: mpl}",
        [],
        "my.yaml:2: policy.type: policy 'mpl' does not exist; did you mean 'mlp'?",
    ),
    "algorithm that does not exist": (
        "",
        ["algorithm.type=pop"],
        "command line: algorithm.type=pop: algorithm.type: algorithm 'pop' does not exist; did you mean 'ppo'?",
    ),
    "module that does not exist": (
        "env: {type: my_lab.pouring}",
        [],
        "my.yaml:2: env.type: env 'my_lab.pouring': there is no module 'my_lab'",
    ),
    "env file that does not exist": (
        "env: {type: ./pouring.py}",
        [],
        "my.yaml:2: env.type: env '{here}/pouring.py': no such file",
    ),
    "task that does not exist": (
        "env: {type: tabletop, tasks: [reach, pull]}",
        [],
        "my.yaml:2: env.tasks: task 'pull' does not exist; did you mean 'push'?",
    ),
    "a mean over one unit": (
        "algorithm: {loss: {ratio: unit, reduce: mean}}",
        [],
        "my.yaml:2: algorithm.loss: reduce (mean) does nothing with ratio (unit), whose cells hold one unit each: "
        "set reduce: sum, or ratio: action, decision or trajectory",
    ),
    "a clip that nothing reads": (
        "algorithm: {loss: {trust: none, dual_clip: 3}}",
        [],
        "my.yaml:2: algorithm.loss: dual_clip (3.0) does nothing with trust (none): remove it, or set trust: clip",
    ),
    "an upper clip of a quadratic trust region": (
        "algorithm: {loss: {trust: quadratic, clip_high: 0.3}}",
        [],
        "my.yaml:2: algorithm.loss: clip_high (0.3) does nothing with trust (quadratic): remove it, or set trust: clip",
    ),
    "a warm-up of no critic": (
        "algorithm: {type: grpo, update: {critic_warmup: 3}}",
        [],
        "my.yaml:2: algorithm: update.critic_warmup (3) trains the critic only, and loss.value.coef is 0.0: remove the "
        "warm-up, or set the coefficient above 0",
    ),
    "lambda without GAE": (
        "algorithm: {credit: {returns: trajectory, baseline: none, lam: 0.9}}",
        [],
        "my.yaml:2: algorithm.credit: lam (0.9) does nothing with returns (trajectory): remove it, or use gae",
    ),
    "copies and groups do not fit": (
        "collect: {copies: 6, group_size: 4, mode: episodes}",
        [],
        "my.yaml:2: collect: copies (6) must be a multiple of group_size (4) times pipeline (1): change copies to 8",
    ),
    "groups in a stream": (
        "collect: {copies: 8, group_size: 4}",
        [],
        "my.yaml:2: collect: group_size (4) above 1 needs mode: episodes, so that a group ends together",
    ),
    "dynamic sampling without groups": (
        "collect: {mode: episodes, dynamic_sampling: drop}",
        [],
        "my.yaml:2: collect: dynamic_sampling (drop) looks for groups whose returns differ, and group_size is 1: set "
        "group_size: 8 and mode: episodes, or dynamic_sampling: none",
    ),
    "attempts without refilling": (
        "collect: {copies: 8, group_size: 4, mode: episodes, dynamic_sampling: drop, max_attempts: 9}",
        [],
        "my.yaml:2: collect: max_attempts (9) does nothing with dynamic_sampling (drop): remove it, or set "
        "dynamic_sampling: refill",
    ),
    "a curriculum's window without a curriculum": (
        "collect: {curriculum: {window: 20}}",
        [],
        "my.yaml:2: collect.curriculum: window (20) does nothing with kind (none): remove it, or set kind: success",
    ),
    "a schedule without its target": (
        "algorithm: {update: {lr_schedule: adaptive_kl}}",
        [],
        "my.yaml:2: algorithm.update: lr_schedule adaptive_kl needs target_kl (found null): set target_kl, for example 0.01",
    ),
    "what foresight reads without foresight": (
        "policy: {type: tiny_vla_flow, foresight: 0, foresight_reads: summary}",
        [],
        "my.yaml:2: policy: foresight_reads (summary) does nothing with foresight (0): remove it, or set foresight",
    ),
    "a warm-up of a step size that is found": (
        "algorithm: {update: {lr_schedule: adaptive_kl, target_kl: 0.01, lr_warmup: 5}}",
        [],
        "my.yaml:2: algorithm.update: lr_warmup (5) does nothing with lr_schedule (adaptive_kl), which finds the step size "
        "itself: remove it, or set lr_schedule: constant",
    ),
    "a critic that reads and is not there": (
        "policy: {type: tiny_vla_flow, critic: {kind: none, reads: privileged}}",
        [],
        "my.yaml:2: policy.critic: reads (privileged) does nothing with kind (none): remove it, or set kind: scalar",
    ),
    "a width of no critic": (
        "policy: {type: tiny_vla_tokens, critic: {kind: none, hidden: 64}}",
        [],
        "my.yaml:2: policy.critic: hidden (64) does nothing with kind (none): remove it, or set kind: scalar",
    ),
    "a critic that would teach nothing and is not there": (
        "policy: {type: pi0, critic: {kind: none, detach: true}}",
        [],
        "my.yaml:2: policy.critic: detach (True) does nothing with kind (none): remove it, or set kind: scalar",
    ),
    "bins of a critic that does not classify": (
        "policy: {type: tiny_vla_flow, critic: {bins: 21}}",
        [],
        "my.yaml:2: policy.critic: bins (21) does nothing with kind (scalar): remove it, or set kind: hl_gauss",
    ),
    "a range of a critic that does not classify": (
        "policy: {type: tiny_vla_flow, critic: {high: 2.0}}",
        [],
        "my.yaml:2: policy.critic: high (2.0) does nothing with kind (scalar): remove it, or set kind: hl_gauss",
    ),
    "a range of no critic": (
        "policy: {type: tiny_vla_flow, critic: {kind: none, low: -2.0}}",
        [],
        "my.yaml:2: policy.critic: low (-2.0) does nothing with kind (none): remove it, or set kind: hl_gauss",
    ),
    "hindsight that nobody imitates": (
        "algorithm: {self_imitation: {hindsight: true}}",
        [],
        "my.yaml:2: algorithm.self_imitation: hindsight (True) does nothing with coef (0): remove it, or set coef above 0",
    ),
    "the middle one of an even number of draws": (
        "policy: {type: tiny_vla_tokens, draws: 4}",
        [],
        "my.yaml:2: policy.draws: draws (4) has no middle one: take 3 or 5",
    ),
    "successes that nobody imitates": (
        "algorithm: {self_imitation: {rows: 128}}",
        [],
        "my.yaml:2: algorithm.self_imitation: rows (128) does nothing with coef (0): remove it, or set coef above 0",
    ),
}


def say(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_in_a_recipe_has_exactly_this_message(name, toy, capsys):
    text, overrides, message = ROWS[name]
    (toy / "my.yaml").write_text(f"extends: toy.yaml\n{text}\n")
    expected = f"error: 1 problem in the recipe my.yaml:\n  {message.replace('{here}', str(toy))}\n"
    assert say(capsys, ["show-config", "my.yaml", *overrides]) == expected


def test_a_recipe_that_does_not_exist(toy, capsys):
    assert say(capsys, ["train", "tabletop_demos"]) == (
        "error: recipe 'tabletop_demos': no such file, and no packaged recipe has this name; did you mean 'tabletop_demo'?\n"
    )


def test_an_extended_file_that_does_not_exist(toy, capsys):
    (toy / "my.yaml").write_text("extends: [toy.yaml, fast.yaml]\n")
    assert say(capsys, ["train", "my.yaml"]) == (
        "error: 1 problem in the recipe my.yaml:\n"
        "  my.yaml:1: extends: 'fast.yaml' is neither beside this file nor in the packaged configs/\n"
    )


def test_a_circle_of_extends(toy, capsys):
    (toy / "a.yaml").write_text("extends: [toy.yaml, b.yaml]\n")
    (toy / "b.yaml").write_text("seed: 1\nextends: a.yaml\n")
    assert say(capsys, ["train", "a.yaml"]) == (
        "error: 1 problem in the recipe a.yaml:\n  b.yaml:2: extends: goes in a circle: a.yaml -> b.yaml -> a.yaml\n"
    )


def test_an_empty_recipe(toy, capsys):
    (toy / "my.yaml").write_text("")
    lines = say(capsys, ["train", "my.yaml"]).splitlines()
    assert lines[0] == "error: 3 problems in the recipe my.yaml:"
    known = ", ".join(registry.names("policy"))
    assert lines[2] == (
        f"  my.yaml: policy: the section is missing; add `policy: {{type: ...}}` (known: {known}, a dotted module, or a .py file)"
    )


def test_a_section_without_type(toy, capsys):
    (toy / "my.yaml").write_text((toy / "toy.yaml").read_text().replace("type: mlp, ", ""))
    known = ", ".join(registry.names("policy"))
    assert say(capsys, ["train", "my.yaml"]) == (
        "error: 1 problem in the recipe my.yaml:\n  my.yaml:3: policy.type: missing; it says which policy these settings "
        f"are for (known: {known}, a dotted module, or a .py file)\n"
    )


def test_a_folder_that_is_no_run(toy, capsys):
    (toy / "empty").mkdir()
    assert say(capsys, ["train", "empty"]).startswith("error: recipe 'empty': no such file, and no packaged recipe has this name")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("envpool", "env 'envpool' needs the package 'envpool', which is not installed; run: pip install 'embodied-rl[envpool]'"),
        ("my_physics", "env '{here}/mine.py' needs the package 'my_physics', which is not installed; run: pip install my_physics"),
    ],
)
def test_an_extra_that_is_not_installed(package, message, toy, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "embodied_rl.envs.envpool", raising=False)
    (toy / "mine.py").write_text("import my_physics\n")
    kind = "envpool" if package == "envpool" else "mine.py"
    assert say(capsys, ["show-config", "toy.yaml", f"env.type={kind}"]) == (
        f"error: 1 problem in the recipe toy.yaml:\n  command line: env.type={kind}: env.type: {message.replace('{here}', str(toy))}\n"
    )


def test_a_file_that_offers_no_env(toy, capsys):
    (toy / "mine.py").write_text("x = 1\n")
    assert say(capsys, ["show-config", "toy.yaml", "env.type=mine.py"]) == (
        "error: 1 problem in the recipe toy.yaml:\n"
        f"  command line: env.type=mine.py: env.type: env '{toy}/mine.py': {toy}/mine.py defines no Config and no build; "
        "a file of this kind needs Config and build\n"
    )


def test_several_mistakes_are_told_together(toy, capsys):
    (toy / "my.yaml").write_text("extends: toy.yaml\nseed: -1\nsed: 1\nseed: 2\nenv: {max_steps: 0, type: ''}\n")
    err = say(capsys, ["show-config", "my.yaml", "colect.copies=3"])
    assert err.splitlines()[0] == "error: 5 problems in the recipe my.yaml:"
    for place in ("my.yaml:2: seed", "my.yaml:3: sed", "my.yaml:4: key 'seed'", "my.yaml:5: env.type", "colect"):
        assert place in err
