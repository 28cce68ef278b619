"""Runs a benchmark: `python bench NAME [options]`. Without a name it lists them."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from registry import BENCHMARKS, listed


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(listed())
        return 0
    name, *options = words
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS) or list(BENCHMARKS)
        print(f"error: no benchmark is called {name!r}; there is {', '.join(near)}", file=sys.stderr)
        return 2
    sys.argv = [f"bench {name}", *options]
    return int(import_module(BENCHMARKS[name].module).main())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
