"""Measures the present machine: kernels as our programs run them, and the collectives of its ranks.

shapes.py says what is timed, kernels.py and collectives.py run it, measure.py times it in every rank, processes.py
starts the ranks. What comes out is data (`cost_model.measurements`), which `cost_model.calibration_fit` turns into the
constants of a hardware file.
"""
