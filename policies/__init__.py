"""Network families, one file or folder each; imported as `embodied_rl.policies`."""

if __name__ != "embodied_rl.policies":
    raise ImportError(
        "this folder is installed as 'embodied_rl.policies': run `pip install -e .` in the repository "
        "and write `from embodied_rl.policies import ...` instead of `import policies`"
    )
