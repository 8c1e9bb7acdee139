"""Widely used models at their published sizes, one file with a `build()` each, as `omnicompile plan` takes them.

Files that are also examples or benchmarks are links to those. Nothing else in the package names a model: recipes and
`models.yaml` name these files as data.
"""
