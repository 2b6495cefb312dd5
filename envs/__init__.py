"""Sources of experience, one file or folder each; imported as `embodied_rl.envs`."""

if __name__ != "embodied_rl.envs":
    raise ImportError(
        "this folder is installed as 'embodied_rl.envs': run `pip install -e .` in the repository "
        "and write `from embodied_rl.envs import ...` instead of `import envs`"
    )
